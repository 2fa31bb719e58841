"""Arrays as numpy reads them."""

import numpy as np
import pytest

from diffattack.data.records import read_arrays

ARRAYS = {
    "floats": np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 3, 4),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "big_endian": np.arange(3, dtype=">i4"),
    "text": np.array("ümlaut"),
    "names": np.array([["a", "bcd"]]),
    "none": np.zeros((0, 4)),
    "scalar": np.array(1.5),
    "flags": np.array([True, False]),
    "fields": np.zeros(2, [("size", "<f4"), ("x", "<i2")]),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_numpy_reads_them(tmp_path, save):
    save(tmp_path / "some.npz", **ARRAYS)
    read = read_arrays(tmp_path / "some.npz")
    with np.load(tmp_path / "some.npz") as expected:
        assert list(read) == list(expected)
        for name in expected:
            assert read[name].dtype == expected[name].dtype and read[name].shape == expected[name].shape
            assert (read[name] == expected[name]).all() and read[name].flags.writeable


def test_pickled_objects_are_not_read(tmp_path):
    np.savez(tmp_path / "some.npz", objects=np.array({"a": 1}, dtype=object))
    with pytest.raises(ValueError, match="OBJECT array"):
        read_arrays(tmp_path / "some.npz")
