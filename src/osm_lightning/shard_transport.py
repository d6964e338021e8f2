"""How the bytes of a remote folder's files come: over http(s), from S3, or out of a shell command.

Each way opens a file once and says of a failure whether asking again may help. Asking again, checking and keeping what
came is `shard_folder.py`'s.
"""

from __future__ import annotations

import os
import random
import select
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import IO
from urllib.parse import quote, urlsplit

import requests
from requests import exceptions as http_errors

CHUNK_BYTES = 1 << 18
"""Read at once."""

Body = tuple[int, Iterator[bytes]]
"""The offset at which a file's bytes begin to come, and the bytes."""
Opener = Callable[[str, int], AbstractContextManager[Body]]
"""Opens a remote folder's file by name, at an offset where it can and else at 0."""


class LastingError(Exception):
    """Asking again would not help."""


class MissingError(LastingError):
    """There is no such file."""


class PassingError(Exception):
    """Asking again may help."""


class SpoiltError(PassingError):
    """Asking again may help, but what is here already cannot be continued."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How often a remote folder is asked, and how long it is waited for."""

    attempts: int = 6
    """For each file. The next one resumes where the last was cut, if the other side can."""
    pause_s: float = 2.0
    """Longest pause after the first attempt; twice that after the second, and so on."""
    connect_s: float = 10.0
    """Longest wait for a connection."""
    stall_s: float = 60.0
    """Longest wait for the next bytes."""
    sleep: Callable[[float], object] = time.sleep

    def pause(self, attempt: int) -> None:
        """Waits half to all of an attempt's pause: what failed together should not come back together."""
        share = random.SystemRandom().uniform(0.5, 1.0)  # must differ between ranks, and not touch the seeded generator
        self.sleep(share * self.pause_s * 2 ** (attempt - 1))


PATIENCE = Patience()


def _range(offset: int) -> dict[str, str]:
    return {"Range": f"bytes={offset}-"} if offset else {}


def _check_status(code: int, reason: str) -> None:
    text = f"the server answers {code} ({reason})"
    if code in (404, 410):
        raise MissingError(text)
    if code == 416:  # nothing comes after what is here already, and that is not yet the whole file
        raise SpoiltError(text)
    if code in (408, 425, 429) or code >= 500:
        raise PassingError(text)
    if code not in (200, 206):
        raise LastingError(text)


@contextmanager
def open_http(folder: str, patience: Patience, name: str, offset: int) -> Iterator[Body]:
    """Opens a file of a folder behind http or https."""
    url = urlsplit(folder)
    file = url._replace(path=f"{url.path.rstrip('/')}/{quote(name)}", fragment="").geturl()
    headers = {"Accept-Encoding": "identity"} | _range(offset)
    limits_s = (patience.connect_s, patience.stall_s)
    try:
        with requests.get(file, headers=headers, stream=True, timeout=limits_s) as response:
            if url.scheme == "https" and any(hop.url.startswith("http:") for hop in [*response.history, response]):
                raise LastingError("the server redirects from https to http, where anybody may change what is sent")
            _check_status(response.status_code, response.reason)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise LastingError("the server sends it compressed, though asked not to")
            yield offset if response.status_code == 206 else 0, response.iter_content(CHUNK_BYTES)
    except (http_errors.InvalidSchema, http_errors.InvalidURL, http_errors.TooManyRedirects) as error:
        raise LastingError(f"the address, or one that it leads to, cannot be followed ({error})") from error
    except requests.RequestException as error:
        cause = error.args[0] if error.args else error
        raise PassingError(str(getattr(cause, "reason", cause))) from error  # the reason alone: no url, so no secrets


@contextmanager
def open_s3(folder: str, patience: Patience, name: str, offset: int) -> Iterator[Body]:
    """Opens a file of a folder in S3."""
    try:
        import boto3
        from botocore import exceptions as s3_errors
        from botocore.config import Config
    except ImportError as error:
        raise ValueError(f"shard folder {folder} needs boto3. Install it: pip install 'osm_lightning[s3]'") from error
    url = urlsplit(folder)
    key = f"{url.path.strip('/')}/{name}".lstrip("/")
    once = {"total_max_attempts": 1}  # attempts are counted above
    limits = Config(connect_timeout=patience.connect_s, read_timeout=patience.stall_s, retries=once)
    try:
        client = boto3.session.Session().client("s3", config=limits)
        answer = client.get_object(Bucket=url.netloc, Key=key, **_range(offset))
        with closing(answer["Body"]) as body:  # as a context manager of its own it would give the raw stream
            yield offset if "ContentRange" in answer else 0, body.iter_chunks(CHUNK_BYTES)
    except s3_errors.ClientError as error:
        _check_status(error.response["ResponseMetadata"]["HTTPStatusCode"], str(error))
        raise LastingError(str(error)) from error
    except (
        s3_errors.ConnectionError,
        s3_errors.HTTPClientError,
        s3_errors.IncompleteReadError,
        s3_errors.FlexibleChecksumError,
    ) as error:
        raise PassingError(str(error)) from error
    except s3_errors.BotoCoreError as error:
        raise LastingError(str(error)) from error


def allowed_command(location: str) -> str:
    """The command of a `pipe:` location, if the environment allows such.

    Raises:
        ValueError: it does not, or the command has no place for a name.
    """
    command = location.removeprefix("pipe:")
    if os.environ.get("OSM_ALLOW_PIPE") != "1":
        raise ValueError(
            f"shard folder {location} is a shell command, and a config or checkpoint of somebody else's could run "
            "anything. If you trust it, set OSM_ALLOW_PIPE=1 in the environment."
        )
    if "{file}" not in command:
        raise ValueError(f"shard folder {location} lacks {{file}}, for which the name of a file is put. Add it.")
    return command


@contextmanager
def open_command(command: str, patience: Patience, name: str, _offset: int) -> Iterator[Body]:
    """Opens the output of the command that gives a file; always at its start."""
    if name.startswith("-"):
        raise LastingError("a command would take the name for an option")
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command.replace("{file}", shlex.quote(name)),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            yield 0, _output(process.stdout, process, said, patience.stall_s)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the shell and all that it started
            process.stdout.close()
            process.wait()


def _output(pipe: IO[bytes], process: subprocess.Popen[bytes], said: IO[bytes], stall_s: float) -> Iterator[bytes]:
    ready = select.poll()
    ready.register(pipe, select.POLLIN)
    while True:
        if not ready.poll(stall_s * 1000):
            raise PassingError(f"the command sent nothing for {stall_s:g} s")
        chunk = os.read(pipe.fileno(), CHUNK_BYTES)
        if not chunk:
            break
        yield chunk
    try:
        code = process.wait(stall_s)
    except subprocess.TimeoutExpired as error:
        raise PassingError(f"the command closed its output, but did not end within {stall_s:g} s") from error
    if code:
        said.seek(max(0, said.seek(0, os.SEEK_END) - 1000))
        last_words = said.read().decode(errors="replace").strip()
        raise PassingError(f"the command ended with code {code}: {last_words}")
