"""A video may not make the server open anything: no file, no connection.

Each input names a file that is watched for being opened, or a socket that listens.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import pytest

from bench.numbered_clips import make_clip
from scissor_vllm.frontend.refusal import RefusedVideoError
from scissor_vllm.frontend.video.loader import PyAVVideoBackend, register_video_loader
from scissor_vllm.metrics import Reason

_IN_OPEN = 0x20


class Canary:
    """A video file and a socket, and whether anybody opened one of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._events = self._libc.inotify_init1(os.O_NONBLOCK)
        assert self._libc.inotify_add_watch(self._events, os.fsencode(path), _IN_OPEN) >= 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.setblocking(False)
        self.port = self._server.getsockname()[1]

    def is_touched(self) -> bool:
        """Whether the file was opened or the socket connected to since the last call."""
        touched = False
        for touch in (self._read_events, self._accept):
            try:
                touch()
                touched = True
            except BlockingIOError:
                pass
        return touched

    def _read_events(self) -> None:
        os.read(self._events, 4096)

    def _accept(self) -> None:
        self._server.accept()[0].close()

    def close(self) -> None:
        """Free what the system holds."""
        os.close(self._events)
        self._server.close()


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    if not sys.platform.startswith("linux"):
        pytest.skip("needs inotify")
    register_video_loader()
    canary = Canary(make_clip(tmp_path / "canary.mp4", num_frames=4, width=64, height=64))
    yield canary
    canary.close()


def _hls(canary: Canary) -> bytes:
    return (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{canary.path}\n#EXTINF:1,\n"
        f"http://127.0.0.1:{canary.port}/a.mp4\n#EXT-X-ENDLIST\n"
    ).encode()


def _concat(canary: Canary) -> bytes:
    return f"ffconcat version 1.0\nfile {canary.path}\n".encode()


def _concat_http(canary: Canary) -> bytes:
    return f"ffconcat version 1.0\nfile http://127.0.0.1:{canary.port}/a.mp4\n".encode()


def _sdp(canary: Canary) -> bytes:
    return (
        f"v=0\nc=IN IP4 127.0.0.1\nm=video {canary.port} RTP/AVP 96\n"
        f"a=rtpmap:96 H264/90000\na=control:rtsp://127.0.0.1:{canary.port}/a\n"
    ).encode()


def _mpd(canary: Canary) -> bytes:
    return (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" '
        'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011" type="static" '
        'mediaPresentationDuration="PT1S"><Period><AdaptationSet contentType="video">'
        '<Representation id="1" bandwidth="1" mimeType="video/mp4" codecs="avc1">'
        f"<BaseURL>http://127.0.0.1:{canary.port}/a.mp4</BaseURL></Representation>"
        "</AdaptationSet></Period></MPD>"
    ).encode()


def _smooth(canary: Canary) -> bytes:
    return f"[Reference]\r\nRef1=http://127.0.0.1:{canary.port}/a.asf\r\n".encode()


def _rtsp_text(canary: Canary) -> bytes:
    return f"RTSPtextrtsp://127.0.0.1:{canary.port}/a".encode()


def _avs(canary: Canary) -> bytes:
    return f'FFmpegSource2("{canary.path}")\n'.encode()


def _image_pattern(canary: Canary) -> bytes:
    return f"{canary.path.parent}/%03d.png\n".encode()


PLAY_LISTS = [
    _hls,
    _concat,
    _concat_http,
    _sdp,
    _mpd,
    _smooth,
    _rtsp_text,
    _avs,
    _image_pattern,
]
BEGINNINGS = [b"", b"FLV\x01\n", b"\0\0\0\x08free", b"OggS\0\x02\n", b"\x1a\x45\xdf\xa3\n"]


@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("make", PLAY_LISTS)
def test_play_lists_and_descriptions_are_refused_and_not_followed(
    make: Callable[[Canary], bytes], beginning: bytes, canary: Canary
) -> None:
    for backend in ("pyav", "opencv"):
        with pytest.raises(RefusedVideoError, match="a video must be a whole file") as refused:
            PyAVVideoBackend.load_bytes(beginning + make(canary), num_frames=2, backend=backend)
        assert refused.value.reason is Reason.UNREADABLE_VIDEO
    assert not canary.is_touched()


def test_the_canary_notices_a_reader_that_follows_a_play_list(
    canary: Canary, tmp_path: Path
) -> None:
    play_list = tmp_path / "list.txt"
    play_list.write_bytes(_concat(canary))
    with av.open(str(play_list), format="concat", options={"safe": "0"}) as container:
        assert list(container.decode(video=0))
    assert canary.is_touched()
    with pytest.raises(av.FFmpegError):
        av.open(f"http://127.0.0.1:{canary.port}/a.mp4", timeout=0.2)
    assert canary.is_touched()


def with_external_reference(data: bytes, target: Path) -> bytes:
    """An MP4 whose video lies in another file, by an alias record of QuickTime."""
    path = os.fsencode(target)
    name = target.name.encode()
    alias = b"\0" * 10 + bytes([4]) + b"disk".ljust(27, b"\0") + b"\0" * 12
    alias += bytes([len(name)]) + name.ljust(63, b"\0") + b"\0" * 16
    alias += struct.pack(">hh", 1, 1) + b"\0" * 16
    alias += struct.pack(">hH", 2, len(path)) + path + b"\0" * (len(path) % 2)
    alias += struct.pack(">hH", 18, len(path)) + path + b"\0" * (len(path) % 2)
    alias += struct.pack(">hH", -1, 0)
    entry = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    box = struct.pack(">I4sII", 16 + len(entry), b"dref", 0, 1) + entry
    start = data.index(b"dref") - 4
    (size,) = struct.unpack(">I", data[start : start + 4])
    grown = bytearray(data[:start] + box + data[start + size :])
    for parent in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        at = data.rindex(parent, 0, start) - 4
        (size_of_parent,) = struct.unpack(">I", data[at : at + 4])
        grown[at : at + 4] = struct.pack(">I", size_of_parent + len(box) - size)
    return bytes(grown)


def test_a_reference_to_another_file_is_not_followed(canary: Canary, tmp_path: Path) -> None:
    data = make_clip(tmp_path / "own.mov", num_frames=4, width=64, height=64).read_bytes()
    referring = with_external_reference(data, canary.path)
    with pytest.raises(RefusedVideoError):
        PyAVVideoBackend.load_bytes(referring, num_frames=2)
    assert not canary.is_touched()
    # The reference is one that FFmpeg follows where it is let.
    path = tmp_path / "referring.mov"
    path.write_bytes(referring)
    with av.open(str(path), options={"enable_drefs": "1", "use_absolute_path": "1"}) as container:
        list(container.demux())
    assert canary.is_touched()


def test_texts_inside_a_video_file_open_nothing(tmp_path: Path) -> None:
    register_video_loader()
    data = make_clip(tmp_path / "clip.mp4", num_frames=6, width=64, height=64).read_bytes()
    text = b"<mpd <MPD \nc=IN IP4 127.0.0.1\r\n#EXTM3U ffconcat version 1.0\n"
    # After everything else nothing moves; before it, offsets are those of a copy that is cut.
    box = struct.pack(">I4s", 8 + len(text), b"free") + text
    frames, _ = PyAVVideoBackend.load_bytes(data + box, num_frames=6)
    plain, _ = PyAVVideoBackend.load_bytes(data, num_frames=6)
    assert (frames == plain).all()
    in_pictures = bytearray(data)
    place = data.index(b"x264 - core")
    in_pictures[place : place + len(text)] = text
    frames, _ = PyAVVideoBackend.load_bytes(bytes(in_pictures), num_frames=6)
    assert (frames == plain).all()
