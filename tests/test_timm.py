"""timm and torchvision as they are installed beside a CPU-only torch: torchvision's operators are of another
build, so that it cannot be imported as it is.

They are looked for in `.timm`, since they must not stand in the way of the other tests:
`pip install --no-deps --target .timm timm torchvision`.
"""

import os
import sys

import pytest
from conftest import ENVIRONMENT, MAIN, ROOT, flags, start

TIMM = ROOT / ".timm"
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not TIMM.is_dir(), reason="timm and torchvision are not in .timm"),
]


def in_a_process(*command) -> str:
    path = f"{TIMM}{os.pathsep}{ROOT}"
    result = start([*map(str, command)], anew=True, env=ENVIRONMENT | {"PYTHONPATH": path})
    out, errors = result.communicate(timeout=300)
    assert result.returncode == 0 and "Traceback" not in errors, errors
    return out


def compare_preprocessing() -> None:
    """In a process of its own: each alias against timm's own transform on the demo's photographs; differences
    in normalised units, of which 8-bit rounding alone is 0.009.
    """
    import timm
    import torch
    from PIL import Image

    from diffattack.classifiers.preprocessing import from_timm
    from diffattack.classifiers.registry import ALIASES
    from diffattack.data.images import to_tensor

    import numpy as np  # isort: skip

    names = [source.removeprefix("timm:") for source, _ in ALIASES.values()]
    assert set(names) <= set(timm.list_models(pretrained=True))
    for name in names:
        config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        transform = timm.data.create_transform(**config, is_training=False)
        for path in sorted((ROOT / "demo/images").iterdir())[:4]:
            for side in (224, 299):
                image = Image.open(path).convert("RGB").resize((side, side), Image.LANCZOS)
                found = from_timm(torch.nn.Identity(), config).preprocess(to_tensor(np.asarray(image)))[0]
                assert (found - transform(image)).abs().max() <= 0.02, name
        print(name)


def test_every_alias_exists_and_its_preprocessing_is_timms_own():
    code = "import sys, diffattack.common.torchvision; sys.path.insert(0, 'tests'); import test_timm; "
    told = in_a_process(sys.executable, "-c", code + "test_timm.compare_preprocessing()")
    assert len(told.splitlines()) == 13


def test_a_run_beside_it(data, tmp_path):
    in_a_process(*MAIN, *flags(data, tmp_path / "out", "--limit", "1"))
