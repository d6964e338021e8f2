"""A fit whose shards, and the vocabulary beside them, lie on a web server."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from shapes_run import QUOTA, settings, write_shapes

from osm_lightning.__main__ import main


def test_shards_are_fetched_once_and_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shapes(tmp_path / "served" / "shapes")
    asked: list[str] = []

    class Server(SimpleHTTPRequestHandler):
        def log_message(self, form: str, *args: object) -> None:
            asked.append(self.path)

    handler = partial(Server, directory=str(tmp_path / "served"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OSM_CACHE", str(tmp_path / "cache"))
    url = f"http://127.0.0.1:{server.server_port}/shapes"
    try:
        (tmp_path / "here").mkdir()
        words = [*settings(tmp_path / "here"), "--data.sources.shapes.shards", url, "--data.num_workers", "2"]
        words += ["--data.masks_per_epoch", str(4 * QUOTA), "--run", str(tmp_path / "run")]
        with pytest.raises(SystemExit) as stopped:
            main(["fit", *words])
    finally:
        server.shutdown()
        server.server_close()
    assert stopped.value.code == 0
    assert (tmp_path / "run" / "scores.json").exists()
    assert sorted(path for path in asked if path.endswith(".tar")) == [
        "/shapes/train-00000.tar",
        "/shapes/val-00000.tar",
    ]
    assert set(asked) == {"/shapes/index.json", "/shapes/vocabulary.tsv", *(p for p in asked if p.endswith(".tar"))}
