"""The live page and the command line around it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tailfin.cli.report import report
from tailfin.errors import UserError
from tailfin.report.live import make_server


@contextmanager
def serving(runs: list[Path]) -> Iterator[int]:
    server = make_server(runs, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def get(port: int, path: str, **headers: str) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, answer.headers["Content-Type"], body


def test_the_page_follows_the_run(make_data: Callable, make_run: Callable, parse_page: Callable) -> None:
    data = make_data()
    run = make_run("going", data, finished=False)
    with serving([run]) as port:
        status, kind, body = get(port, "/")
        assert status == 200 and kind == "text/html; charset=utf-8"
        page = parse_page(body)
        assert "iteration 550" in page.text and page.count("script", src="/plotly.js") == 1 and len(body) < 1e6
        before = get(port, "/version")[2]
        assert get(port, "/version")[2] == before and get(port, "/")[2] == body  # nothing is built again
        with (run / "stages" / "1-train" / "metrics.jsonl").open("a") as file:
            file.write('ch": 1}\n' + json.dumps({"iteration": 570, "epoch": 2.28, "loss": 0.5}) + "\n")
        assert get(port, "/version")[2] != before
        assert "iteration 570" in parse_page(get(port, "/")[2]).text
        (run / "metrics.json").write_text('{"protocol": "lvis", "bbox": {"AP": 0.4321}}')
        assert "43.2" in parse_page(get(port, "/")[2]).text
        (run / "metrics.json").write_text("{")
        broken = get(port, "/")
        assert broken[0] == 200 and "metrics.json is not valid JSON" in broken[2]
        script = get(port, "/plotly.js")
        assert script[0] == 200 and "javascript" in script[1] and len(script[2]) > 1e6


def test_other_paths_and_other_hosts_are_refused(make_data: Callable, make_run: Callable) -> None:
    run = make_run("a", make_data(), finished=False)
    with serving([run]) as port:
        assert get(port, "/recipe.yaml")[0] == 404 and get(port, "/../recipe.yaml")[0] == 404
        assert get(port, "/", Host="evil.example")[0] == 403
        assert get(port, "/version", Host=f"localhost:{port}")[0] == 200


def test_only_this_machine_reaches_it_and_only_the_page(make_data: Callable, make_run: Callable) -> None:
    run = make_run("a", make_data(), finished=False)
    server = make_server([run], 0)
    assert server.server_address[0] == "127.0.0.1"
    server.server_close()
    with serving([run]) as port:
        for host in ("127.0.0.1.evil.example", "localhost.evil.example:80", "evil.example:127", "0.0.0.0", "", "[::1]"):
            assert get(port, "/", Host=host)[0] == 403, host
        for path in (
            "/%2e%2e/recipe.yaml",
            "/..%2frecipe.yaml",
            "//etc/passwd",
            "/../../../../../../etc/passwd",
            f"/{run.name}/recipe.yaml",
            "/index.html/../recipe.yaml",
            "/model.safetensors",
            "/\\..\\recipe.yaml",
        ):
            assert get(port, path)[0] == 404, path
        assert get(port, "http://evil.example/etc/passwd")[0] == 403


def test_ports_and_runs_that_do_not_work(make_data: Callable, make_run: Callable, tmp_path: Path) -> None:
    run = make_run("a", make_data(), finished=False)
    with serving([run]) as port, pytest.raises(UserError, match=f"port {port} cannot be used"):
        make_server([run], port)
    with pytest.raises(UserError, match="0 to 65535"):
        make_server([run], 70000)
    with pytest.raises(UserError, match="does not exist"):
        make_server([tmp_path / "none"], 0)


def test_command_line(make_data: Callable, make_run: Callable, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(report)
    run = make_run("a", make_data(), finished=False)
    done = CliRunner().invoke(app, [str(run), "--out", str(tmp_path / "x.html"), "--title", "A title"])
    assert done.exit_code == 0 and "x.html" in done.output.replace("\n", "")
    assert "A title" in (tmp_path / "x.html").read_text()
    for arguments, message in (
        ([], "no run directory given"),
        (["--live", str(run), "--out", "x.html"], "do not go together"),
        ([str(tmp_path / "b")], "does not exist"),
    ):
        failed = CliRunner().invoke(app, arguments)
        assert isinstance(failed.exception, UserError) and message in str(failed.exception)
