"""`data.yaml` of a YOLO data set: where it is, its classes and its root; or a list of classes in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tailfin.data.images import is_hidden
from tailfin.errors import UserError
from tailfin.files import check_values, read_text

CLASS_LISTS = ("classes.txt", "labels/classes.txt", "labels/*/classes.txt", "obj.names")


def load_plain_yaml(path: Path) -> Any:
    """YAML in which scalars stay text (a class may be called `no` or `1e3`); only an empty value or null is None."""
    try:
        value = yaml.load(read_text(path, "YAML file"), _PlainLoader)
        check_values(value)
        return value
    except RecursionError:
        raise UserError(f"{path} is not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


class _PlainLoader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [
            (tag, pattern) for tag, pattern in entries if tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
        ]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def find_yaml(source: Path) -> Path | None:
    """The data.yaml; None for a folder that has none, but a list of classes."""
    if source.is_file():
        return source
    if (source / "data.yaml").is_file():
        return source / "data.yaml"
    found = sorted(path for path in [*source.glob("*.yaml"), *source.glob("*.yml")] if not is_hidden(path))
    if len(found) == 1:
        return found[0]
    if not found and class_list(source) is not None:
        return None
    listed = ", ".join(path.name for path in found)
    raise UserError(
        f"{source} has no data.yaml"
        + (f" and several other YAML files: {listed}" if found else ", nor a classes.txt with a class name per line")
    )


def class_list(source: Path) -> Path | None:
    return next((path for pattern in CLASS_LISTS for path in sorted(source.glob(pattern)) if path.is_file()), None)


def _names(path: Path, settings: dict[str, Any]) -> list[str]:
    names = settings.get("names")
    if isinstance(names, dict):
        try:
            numbered = {int(key): name for key, name in names.items()}
        except (TypeError, ValueError):
            raise UserError(f"{path}: names: the keys must be class numbers 0, 1, 2, ...") from None
        if sorted(numbered) != list(range(len(names))):
            missing = next(k for k in range(len(names)) if k not in numbered)
            raise UserError(f"{path}: names: the class numbers must run from 0 without gaps, {missing} is missing")
        names = [numbered[k] for k in range(len(numbered))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{path}: names is missing; a list or a mapping from 0, 1, ... to class names is needed")
    check_names(path, names)
    number = settings.get("nc")
    if number is not None and str(number) != str(len(names)):
        raise UserError(f"{path}: nc is {number}, but names has {len(names)} classes")
    return names


def check_names(path: Path, names: list[Any]) -> None:
    if not names:
        raise UserError(f"{path} names no class")
    for k, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise UserError(f"{path}: names: class {k} has no name")
        if names.index(name) != k:
            raise UserError(f'{path}: names: "{name}" is the name of class {names.index(name)} and of class {k}')


def _root(path: Path, settings: dict[str, Any]) -> Path:
    """The folder that relative entries start from: `path:` if it is there, else the folder of the file."""
    given = settings.get("path")
    if isinstance(given, str) and given:
        root = path.parent / given  # an absolute `given` wins
        if root.is_dir():
            return root
    return path.parent
