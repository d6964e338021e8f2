"""What networks and servers do to remote shards: a real server on the loopback, told how to fail."""

from __future__ import annotations

import hashlib
import io
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from osm_lightning.shard_folder import Patience, ShardFolder, open_folder
from osm_lightning.shard_index import ShardIndex, ShardInfo, SplitInfo, write_index

SHARD = bytes(range(256)) * 3000
CHUNK_BYTES = 1 << 18
"""What is written at once; a cut loses what had come of the next such piece."""
INFO = ShardInfo("val-00000.tar", hashlib.sha256(SHARD).hexdigest(), len(SHARD), num_samples=1, num_masks=1)

FETCH = """
import sys
from pathlib import Path
from osm_lightning.shard_folder import open_folder

folder = open_folder(sys.argv[1], Path(sys.argv[2]))
print(folder.path(folder.index.splits["val"].shards[0]))
"""


class Handler(BaseHTTPRequestHandler):
    """Serves the server's files, with ranges if it knows them, after the faults that are due."""

    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.server.asked.append((name, self.headers["Range"]))
        self.server.headers_seen.append((self.path, self.headers["Authorization"]))
        if name == INFO.file and self.server.faults:
            self.server.faults.pop(0)(self)
        elif name in self.server.files:
            self.serve(self.server.files[name])
        else:
            self.answer(404)

    def answer(self, code: int, content: bytes = b"", **headers: object) -> None:
        self.send_response(code)
        for key, value in {"Content_Length": len(content), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def serve(self, content: bytes) -> None:
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if not start or not self.server.knows_ranges:
            self.answer(200, content)
        elif start >= len(content):
            self.answer(416)
        else:
            self.answer(206, content[start:], Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


class FaultyServer(ThreadingHTTPServer):
    """Files by name, and what goes wrong with the next requests for the shard."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {INFO.file: SHARD}
        self.faults: list[Callable[[Handler], None]] = []
        self.knows_ranges = True
        self.asked: list[tuple[str, str | None]] = []
        self.headers_seen: list[tuple[str, str | None]] = []
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/shards/coco"

    def asked_for_shard(self) -> list[str | None]:
        """The ranges of the requests for the shard, None for all of it."""
        return [span for name, span in self.asked if name == INFO.file]


def cut(handler: Handler, after: int) -> None:
    """Promises the whole shard and hangs up in the middle."""
    handler.answer(200, SHARD[:after], Content_Length=len(SHARD))
    handler.close_connection = True


def stall(handler: Handler, after: int) -> None:
    """Promises the whole shard and falls silent in the middle."""
    handler.answer(200, SHARD[:after], Content_Length=len(SHARD))
    handler.server.release.wait(60)
    handler.close_connection = True


def endless(handler: Handler) -> None:
    """Sends the shard and goes on until the other side has enough."""
    handler.send_response(200)
    handler.end_headers()
    handler.close_connection = True
    try:
        while True:
            handler.wfile.write(SHARD)
    except OSError:
        handler.server.release.set()


def status(handler: Handler, code: int, **headers: object) -> None:
    handler.answer(code, b"sorry", **headers)


def other_bytes(handler: Handler) -> None:
    handler.answer(200, SHARD[::-1])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setenv("NO_PROXY", "*")
    write_index(tmp_path, ShardIndex("mine", None, {"val": SplitInfo((INFO,), {})}))
    with FaultyServer() as running:
        running.files["index.json"] = (tmp_path / "index.json").read_bytes()
        thread = threading.Thread(target=partial(running.serve_forever, poll_interval=0.01))
        thread.start()
        yield running
        running.release.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def pauses_s() -> list[float]:
    return []


@pytest.fixture
def folder(server: FaultyServer, tmp_path: Path, pauses_s: list[float]) -> ShardFolder:
    return open_folder(server.url, tmp_path / "cache", Patience(attempts=3, pause_s=1.0, sleep=pauses_s.append))


def visible(folder: ShardFolder) -> set[str]:
    """What could be taken for a whole file."""
    return {path.name for path in folder.folder.iterdir() if not path.name.startswith(".")}


# What passes


@pytest.mark.parametrize("code", [500, 502, 503, 408, 429])
def test_passing_errors_are_retried_with_growing_pauses(server, folder, pauses_s, code):
    server.faults = [partial(status, code=code)] * 2
    assert folder.path(INFO).read_bytes() == SHARD
    assert 0.5 <= pauses_s[0] <= 1.0 <= pauses_s[1] <= 2.0
    assert server.asked_for_shard() == [None] * 3


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_cut_body_is_resumed_where_the_server_can(server, folder, knows_ranges):
    server.knows_ranges = knows_ranges
    server.faults = [partial(cut, after=CHUNK_BYTES + 1000)]
    assert folder.path(INFO).read_bytes() == SHARD
    assert server.asked_for_shard() == [None, f"bytes={CHUNK_BYTES}-"]


def test_a_resumed_body_of_another_version_is_fetched_from_the_start(server, folder):
    def start_of_another(handler: Handler) -> None:
        handler.answer(200, SHARD[::-1][: CHUNK_BYTES + 1000], Content_Length=len(SHARD))
        handler.close_connection = True

    server.faults = [start_of_another]
    assert folder.path(INFO).read_bytes() == SHARD
    assert server.asked_for_shard() == [None, f"bytes={CHUNK_BYTES}-", None]


def test_a_stall_ends_after_its_time(server, tmp_path):
    patience = Patience(attempts=6, stall_s=0.3, sleep=lambda pause_s: None)
    folder = open_folder(server.url, tmp_path / "cache", patience)
    server.faults = [partial(stall, after=CHUNK_BYTES + 1000)]
    assert folder.path(INFO).read_bytes() == SHARD
    assert server.asked_for_shard()[:2] == [None, f"bytes={CHUNK_BYTES}-"]


def test_wrong_bytes_are_thrown_away(server, folder):
    server.faults = [other_bytes]
    assert folder.path(INFO).read_bytes() == SHARD
    assert server.asked_for_shard() == [None, None]


# What does not


def test_patience_ends(server, folder, pauses_s):
    server.faults = [partial(status, code=500)] * 9
    message = re.escape(server.url) + r": val-00000\.tar could not be fetched in 3 of at most 3 attempts.*500.*copy"
    with pytest.raises(ValueError, match=message):
        folder.path(INFO)
    assert len(server.asked_for_shard()) == 3
    assert len(pauses_s) == 2
    assert visible(folder) == {"index.json"}


def test_wrong_bytes_for_good_are_never_shown(server, folder):
    server.faults = [other_bytes] * 3
    with pytest.raises(ValueError, match=f"sha256 is .* states {INFO.sha256}"):
        folder.path(INFO)
    assert visible(folder) == {"index.json"}
    assert not list(folder.folder.glob(".*.partial"))


def test_a_shard_that_is_too_short_is_never_shown(server, folder):
    server.files[INFO.file] = SHARD[:-1]
    with pytest.raises(ValueError, match="ended after 767,999 of 768,000 bytes"):
        folder.path(INFO)
    assert server.asked_for_shard() == [None, "bytes=767999-", None], "the server has nothing more: from the start"
    assert visible(folder) == {"index.json"}


def test_a_body_without_end_is_cut_off(server, folder):
    server.faults = [endless]
    with pytest.raises(ValueError, match=r"in 1 of .*more than the 768,000 bytes"):
        folder.path(INFO)
    assert server.release.wait(10), "the connection is still open"
    assert visible(folder) == {"index.json"}
    assert not list(folder.folder.glob(".*.partial"))


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_lasting_errors_are_not_retried(server, folder, code):
    server.faults = [partial(status, code=code)]
    with pytest.raises(ValueError, match=f"in 1 of at most 3 attempts.*answers {code}"):
        folder.path(INFO)
    assert server.asked_for_shard() == [None]


def test_a_compressed_answer_is_not_unpacked(server, folder):
    server.faults = [partial(status, code=200, Content_Encoding="gzip")]
    with pytest.raises(ValueError, match="compressed"):
        folder.path(INFO)


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x"])
def test_redirects_leave_http_never(server, folder, target):
    server.faults = [partial(status, code=302, Location=target)]
    with pytest.raises(ValueError, match=r"in 1 of at most 3 attempts.*cannot be followed"):
        folder.path(INFO)
    assert visible(folder) == {"index.json"}


def test_redirects_within_http_are_followed(server, folder):
    server.files["moved.tar"] = SHARD
    server.faults = [partial(status, code=302, Location="/elsewhere/moved.tar")]
    assert folder.path(INFO).read_bytes() == SHARD


def test_https_is_not_left_for_http(tmp_path, monkeypatch):
    """No TLS server here: what requests returns after such a redirect stands in for one."""

    def redirected(url: str, **options: object) -> requests.Response:
        hop, response = requests.Response(), requests.Response()
        hop.url, response.url = url, url.replace("https:", "http:")
        response.status_code, response.history, response.raw = 200, [hop], io.BytesIO()
        return response

    monkeypatch.setattr(requests, "get", redirected)
    with pytest.raises(ValueError, match="from https to http"):
        open_folder("https://example.org/coco", tmp_path / "cache")


def test_an_address_without_a_folder_is_no_shard_folder(server, tmp_path):
    del server.files["index.json"]
    with pytest.raises(ValueError, match=re.escape(server.url) + r" has no index\.json"):
        open_folder(server.url, tmp_path / "cache")


def test_an_unreachable_server_is_an_error_even_if_all_is_cached(server, folder, tmp_path):
    folder.path(INFO)
    server.shutdown()
    server.server_close()
    patience = Patience(attempts=2, sleep=lambda pause_s: None)
    with pytest.raises(ValueError, match=r"index\.json could not be fetched in 2 .*refused"):
        open_folder(server.url, tmp_path / "cache", patience)


def test_a_missing_side_file_is_none(server, folder):
    server.files["names.tsv"] = b"id\n"
    path = folder.side_file("names.tsv")
    assert path is not None
    assert path.read_bytes() == b"id\n"
    assert folder.side_file("other.tsv") is None


def test_secrets_are_sent_and_not_shown(server, tmp_path):
    location = server.url.replace("//", "//me:s3cret@") + "/?token=t0ken"
    patience = Patience(attempts=1)
    folder = open_folder(location, tmp_path / "cache", patience)
    path, authorization = server.headers_seen[-1]
    assert path == "/shards/coco/index.json?token=t0ken"
    assert authorization is not None
    assert authorization.startswith("Basic ")
    server.faults = [partial(status, code=500)]
    messages = [repr(folder), str(folder.folder)]
    for break_it in (lambda: None, server.server_close):
        break_it()
        with pytest.raises(ValueError, match="could not be fetched") as caught:
            folder.path(INFO)
        messages.append(str(caught.value))
    assert len(messages) == 4
    assert not any("s3cret" in text or "t0ken" in text for text in messages)


def test_a_full_disk_is_not_left_full(server, folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(SHARD) // 2, hard))
    try:
        with pytest.raises(ValueError, match=r"cannot be written to the cache .*OSM_CACHE"):
            folder.path(INFO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(folder.folder.glob(".*.partial"))
    assert folder.path(INFO).read_bytes() == SHARD


# Several processes


def start(server: FaultyServer, tmp_path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, server.url, os.fspath(tmp_path / "cache")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_fetch_a_shard_once(server, tmp_path):
    second_asked = threading.Event()

    def wait_for_the_other(handler: Handler) -> None:
        """Gives the other process, which has the index too, the time to ask for the shard as well."""
        while [name for name, _ in server.asked].count("index.json") < 2:
            time.sleep(0.01)
        second_asked.wait(1.0)
        handler.serve(SHARD)

    def come_second(handler: Handler) -> None:
        second_asked.set()
        handler.serve(SHARD)

    server.faults = [wait_for_the_other, come_second]
    processes = [start(server, tmp_path) for _ in range(2)]
    paths = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == SHARD
    assert server.asked_for_shard() == [None]


def test_after_sigkill_in_the_middle_the_next_process_goes_on(server, tmp_path):
    server.faults = [partial(stall, after=CHUNK_BYTES + 1000)]
    process = start(server, tmp_path)
    deadline_s = time.monotonic() + 60
    while not any(path.stat().st_size >= CHUNK_BYTES for path in (tmp_path / "cache").rglob(".*.partial")):
        assert time.monotonic() < deadline_s
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    folder = open_folder(server.url, tmp_path / "cache")
    assert visible(folder) == {"index.json"}
    assert folder.path(INFO).read_bytes() == SHARD
    assert server.asked_for_shard() == [None, f"bytes={CHUNK_BYTES}-"]


def test_a_process_killed_between_last_byte_and_name_costs_no_request(server, folder):
    path = folder.path(INFO)
    path.rename(path.with_name(f".{path.name}.partial"))
    assert folder.path(INFO).read_bytes() == SHARD
    assert len(server.asked_for_shard()) == 1


# S3: boto3 against the same faulty server, and against moto's, which knows S3


@pytest.fixture
def s3_account(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("boto3", reason="boto3 (extra s3) is not installed: s3: shard folders were not tried")
    for key, value in {"ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{key}", value)


@pytest.fixture
def s3_folder(s3_account: None, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardFolder:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    patience = Patience(attempts=3, stall_s=2.0, sleep=lambda pause_s: None)
    return open_folder("s3://bucket/coco/", tmp_path / "cache", patience)


def test_s3_without_boto3_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ValueError, match=r"pip install 'osm_lightning\[s3\]'"):
        open_folder("s3://bucket/coco", tmp_path)


@pytest.mark.parametrize(
    ("fault", "resumed_at"),
    [
        (partial(status, code=503), None),
        (partial(cut, after=CHUNK_BYTES + 1000), CHUNK_BYTES + 1000),  # botocore gives out the piece that was cut
        (partial(stall, after=CHUNK_BYTES + 1000), CHUNK_BYTES),
        (other_bytes, None),
    ],
    ids=["503", "cut", "stall", "other bytes"],
)
def test_s3_passing_errors_are_retried(server, s3_folder, fault, resumed_at):
    server.faults = [fault]
    assert s3_folder.path(INFO).read_bytes() == SHARD
    assert server.asked_for_shard() == [None, resumed_at and f"bytes={resumed_at}-"]


@pytest.mark.parametrize("code", [403, 404])
def test_s3_lasting_errors_are_not_retried(server, s3_folder, code):
    server.faults = [partial(status, code=code)]
    with pytest.raises(ValueError, match=f"in 1 of at most 3 attempts.*answers {code}"):
        s3_folder.path(INFO)
    assert server.asked_for_shard() == [None]
    assert s3_folder.side_file("names.tsv") is None


def test_s3_without_credentials_is_not_retried(s3_account, tmp_path, monkeypatch):
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    with pytest.raises(ValueError, match=r"in 1 of .*redentials"):
        open_folder("s3://bucket/coco", tmp_path)


def test_s3_as_moto_understands_it(s3_account, server, tmp_path, monkeypatch):
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed: no server that knows S3")
    import boto3

    s3_server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3_server.start()
    try:
        host, port = s3_server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for name, content in server.files.items():
            client.put_object(Bucket="bucket", Key=f"data/coco/{name}", Body=content)
        folder = open_folder("s3://bucket/data/coco", tmp_path / "cache", Patience(attempts=1))
        assert folder.side_file("names.tsv") is None
        unfinished = folder.folder / f".{INFO.sha256[:16]}-{INFO.file}.partial"
        unfinished.write_bytes(SHARD[:1000])
        assert folder.path(INFO).read_bytes() == SHARD
        with pytest.raises(ValueError, match="has no index"):
            open_folder("s3://bucket/other", tmp_path / "cache", Patience(attempts=1))
    finally:
        s3_server.stop()
