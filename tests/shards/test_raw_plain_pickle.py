import os
import pickle
import struct
from collections import OrderedDict

import numpy as np
import pytest

from osm_lightning.shards.plain_pickle import PickledArray, load_plain

PLAIN = {"a": [1, -(2**70), 0.5, None, True], "b": ("ä", b"\x00\xff"), 3: {"nested": [{}]}}
NAMES = ["wall", "sky, heavens", "ä" * 40]


def load(tmp_path, data, max_bytes=1_000_000):
    path = tmp_path / "foreign.pkl"
    path.write_bytes(data)
    return load_plain(path, max_bytes)


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back(tmp_path, protocol):
    assert load(tmp_path, pickle.dumps(PLAIN, protocol)) == PLAIN


@pytest.mark.parametrize("dtype", [object, str])
@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("package", [b"numpy.core", b"numpy._core"])
def test_arrays_come_as_stand_ins_that_keep_their_texts(tmp_path, protocol, dtype, package):
    content = {"names": np.array(NAMES, dtype=dtype), "counts": np.eye(9), "share": np.float64(0.25), "last": NAMES[0]}
    data = pickle.dumps(content, protocol)
    if package == b"numpy.core":  # as numpy 1 wrote it; the name stands behind its length in protocol 4
        data = data.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
        data = data.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")
        frame = data.find(b"\x95")
        if protocol == 4:
            data = data[: frame + 1] + struct.pack("<Q", len(data) - frame - 9) + data[frame + 9 :]
        assert b"numpy._core" not in data
    loaded = load(tmp_path, data)
    assert {key: type(value) for key, value in loaded.items()} == dict.fromkeys(content, PickledArray) | {"last": str}
    assert loaded["names"].texts() == NAMES
    for number in ("counts", "share"):
        with pytest.raises(ValueError, match="no array of texts"):
            loaded[number].texts()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "args", "wanted"),
    [
        (os.system, ("touch {}",), r"posix\.system"),
        (eval, ("open('{}', 'w')",), r"builtin.*\.eval"),
        (open, ("{}", "w"), r"io\.open"),
        (OrderedDict, (), r"collections\.OrderedDict"),
        (getattr, ("", "join"), r"builtin.*\.getattr"),
    ],
)
def test_whatever_it_wants_to_call_is_named_and_not_called(tmp_path, protocol, function, args, wanted):
    touched = tmp_path / "touched"
    call = Calls(function, *(arg.format(touched) for arg in args))
    with pytest.raises(ValueError, match=wanted):
        load(tmp_path, pickle.dumps({"x": [call]}, protocol))
    assert not touched.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cnumpy\nndarray.__class__\n.",  # a dotted name that leads on from an admitted one
        b"cnumpy\nload\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0ddtype.__init__\x93.",
        b"iposix\nsystem\n.",
        b"Pid\n.",  # a persistent id
        b"\x82\x01.",  # a registered extension
        b"\x80\x05\x97.",  # a buffer from outside
    ],
)
def test_side_doors_are_shut(tmp_path, data):
    with pytest.raises(ValueError, match="is not read as a pickle"):
        load(tmp_path, data)


def test_state_cannot_change_the_stand_in(tmp_path):
    """BUILD with a state for slots sets attributes on whatever lies on the stack, a class as well."""
    state = pickle.dumps((None, {"texts": "changed"}), 2)[2:-1]
    before = dict(vars(PickledArray))
    with pytest.raises(ValueError, match="is not read as a pickle"):
        load(tmp_path, b"\x80\x02cnumpy\ndtype\n" + state + b"b.")
    assert vars(PickledArray) == before


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense",
        pickle.dumps(PLAIN)[:-5],
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",  # bytes of four exabytes
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01.",  # a number of two gigabytes
        b"(" * 1000 + b".",
        b"N" + b"\x85" * 200 + b"q\x01" + b"h\x01" * 3 + b"s.",
    ],
)
def test_broken_pickles_are_refused_in_no_time(tmp_path, data):
    with pytest.raises(ValueError, match="is not read as a pickle"):
        load(tmp_path, data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02X\x01\x00\x00\x00ar\xff\xff\xff\xff.",  # kept at a place for which the C unpickler makes a table
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"\x8c\x01a.",  # in a frame of four exabytes
    ],
)
def test_large_numbers_take_no_memory(tmp_path, data):
    assert load(tmp_path, data) == "a"


@pytest.mark.parametrize("data", [b"", b"N." + bytes(99)])
def test_size_is_bounded(tmp_path, data):
    with pytest.raises(ValueError, match="it must have 1 to 100"):
        load(tmp_path, data, max_bytes=100)
