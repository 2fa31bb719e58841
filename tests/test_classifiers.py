"""Classifiers by name, each of a real object: what they compute; those that cannot be had are refused."""

import numpy as np
import pytest
import torch
from conftest import IMAGES, ROOT, check, network, save_vit
from natsort import natsorted
from PIL import Image

from diffattack.classifiers.preprocessing import from_processor, from_timm
from diffattack.classifiers.registry import REGISTRY, check_name, load_classifier
from diffattack.common.errors import InputError
from diffattack.data.images import read_image
from diffattack.evaluation.predictions import predict


@pytest.mark.parametrize("name", REGISTRY)
def test_an_embedded_classifier(name):
    """Its inputs are normalised as its weights expect, gradients reach images of any size, and every demo
    image is classified correctly.
    """
    classifier = load_classifier(name)
    x = torch.rand(2, 3, *classifier.resize)
    assert torch.allclose(classifier(x), classifier.network((255 * x - 127) / 128), atol=1e-4)
    x = torch.rand(1, 3, 192, 192, requires_grad=True)
    classifier(x)[0, 5].backward()
    assert x.grad.isfinite().all() and (x.grad != 0).float().mean() > 0.9
    paths = natsorted((ROOT / "demo/images").iterdir(), key=lambda path: path.name)
    labels = np.loadtxt(ROOT / "demo/labels.txt", dtype=int) - 1
    assert len(paths) == len(labels) >= 11 and len(set(labels.tolist())) == len(labels)
    pictures = np.stack([read_image(path, 224) for path in paths])
    predictions = predict(classifier, pictures, labels, torch.device("cpu"))
    assert predictions["label"].tolist() == labels.tolist()


@pytest.mark.parametrize("kind, name", [("script", "net.pt"), ("script", "net"), ("export", "net.pt")])
def test_a_program_is_known_by_what_is_in_its_file(tmp_path, kind, name):
    if kind == "script":
        torch.jit.script(network(10)).save(tmp_path / name)
    else:
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(network(10), (IMAGES[:2],), dynamic_shapes=shapes)
        torch.export.save(program, f"{tmp_path}/net.pt2")
        (tmp_path / "net.pt2").rename(tmp_path / name)
    check(tmp_path / name, 10, network(10)(IMAGES))


def test_a_background_class_is_left_out(tmp_path):
    torch.jit.script(network(1001)).save(tmp_path / "net.ts")
    check(tmp_path / "net.ts", 1000, network(1001)(IMAGES)[:, 1:])


# ---------------------------------------------------------------- preprocessing as others describe it


def test_a_hugging_face_folder(tmp_path):
    from transformers import ViTForImageClassification, ViTImageProcessor

    save_vit(tmp_path, num_labels=10)
    numbers = dict(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25], resample=3)
    processor = ViTImageProcessor(size={"height": 96, "width": 96}, **numbers)
    processor.save_pretrained(tmp_path)
    pixels = (IMAGES * 255).round().byte()
    given = processor(list(pixels.permute(0, 2, 3, 1).numpy()), return_tensors="np")["pixel_values"]
    classifier = load_classifier(f"hf:{tmp_path}", 10, 96)
    assert torch.allclose(
        classifier.preprocess(pixels.float() / 255), torch.as_tensor(np.asarray(given)), atol=1e-5
    )
    model = ViTForImageClassification.from_pretrained(tmp_path).eval()
    check(f"hf:{tmp_path}", 10, model(pixel_values=classifier.preprocess(IMAGES)).logits.detach())


@pytest.mark.parametrize(
    "settings",
    [
        dict(size={"height": 96, "width": 80}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]),
        dict(do_normalize=False),
        dict(do_rescale=False),
        dict(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3),
    ],
)
def test_preprocessing_of_image_processors(settings):
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(**{"size": {"height": 96, "width": 96}} | settings)
    shape = (processor.size["height"], processor.size["width"], 3)
    pixels = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    found = from_processor(torch.nn.Identity(), processor)(
        torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    )
    expected = torch.as_tensor(np.asarray(processor(pixels, return_tensors="np")["pixel_values"], np.float32))
    assert torch.allclose(found, expected, atol=1e-5 * max(1, expected.abs().max()))

    class Flipped(ViTImageProcessor):
        def __call__(self, images, **options):
            return super().__call__(images[:, ::-1].copy(), **options)

    with pytest.raises(ValueError, match="does something that is not known here"):
        from_processor(torch.nn.Identity(), Flipped(size={"height": 96, "width": 96}))


@pytest.mark.parametrize("interpolation, pillow", [("bilinear", 2), ("bicubic", 3)])
def test_resizing_is_pillows_and_the_crop_is_the_middle(interpolation, pillow):
    """Of timm's evaluation transform, from its configuration; against Pillow in floating point, since timm
    itself may not be here.
    """
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config = dict(input_size=(3, 64, 64), crop_pct=0.8, interpolation=interpolation, mean=mean, std=std)
    images = torch.rand(2, 3, 150, 150, generator=torch.Generator().manual_seed(1))

    def resize(channel: np.ndarray) -> np.ndarray:
        """In two passes, as Pillow, which clips 8-bit values after each; here without rounding them."""
        for size in ((80, 150), (80, 80)):
            channel = np.asarray(Image.fromarray(channel, mode="F").resize(size, pillow)).clip(0, 1)
        return channel

    resized = np.stack([[resize(channel) for channel in image] for image in images.numpy()])
    expected = (resized[..., 8:72, 8:72] - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(from_timm(torch.nn.Identity(), config)(images), expected, atol=1e-5)


@pytest.mark.parametrize(
    "name, message",
    [
        ("resnet1", "unknown classifier 'resnet1'"),
        ("hf:nowhere", "cannot be loaded .*; expected a folder in transformers format"),
        ("{folder}/none.pt2", "No such file"),
        ("{folder}/bad.ts", "cannot be loaded .*a program of torch.export.save or torch.jit.save"),
        ("{folder}/weights.pt", "no network in it.*; expected .*FILE.py:FUNCTION with a function that"),
        ("{folder}/code.py:none", "it has no function 'none'"),
        ("{folder}/code.py:number", "returned int, and no torch.nn.Module"),
        ("{folder}/code.py:failing", "ModuleNotFoundError: .*not_there_at_all"),
        ("{folder}/net.ts", "has 7 outputs, but there are 10 classes; give --captions"),
    ],
)
def test_classifiers_that_cannot_be_had_are_named(tmp_path, name, message):
    (tmp_path / "bad.ts").write_text("no program")
    torch.save(network(10).state_dict(), tmp_path / "weights.pt")
    code = "def number():\n    return 1\n\n\ndef failing():\n    import not_there_at_all\n"
    (tmp_path / "code.py").write_text(code)
    torch.jit.script(network(7)).save(tmp_path / "net.ts")
    with pytest.raises(InputError, match=message) as caught:
        load_classifier(name.format(folder=tmp_path), 10, 96)
    assert "\n" not in str(caught.value) and check_name("resnet") == "timm:resnet50.tv_in1k"
