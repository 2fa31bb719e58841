import numpy as np
import pytest
import torch
from conftest import IMAGES, ROOT, check, network, save_vit
from natsort import natsorted

from diffattack.classifiers.preprocessing import from_processor, from_timm
from diffattack.classifiers.registry import ALIASES, REGISTRY, check_name, load_classifier
from diffattack.common.errors import InputError
from diffattack.data.classes import IMAGENET_CLASSES
from diffattack.data.images import read_image
from diffattack.evaluation.predictions import predict


def test_imagenet_names():
    assert len(IMAGENET_CLASSES) == len(set(IMAGENET_CLASSES)) == 1000
    assert [IMAGENET_CLASSES[i] for i in (0, 281, 388, 967, 999)] == [
        "tench",
        "tabby",
        "giant panda",
        "espresso",
        "toilet tissue",
    ]


@pytest.mark.parametrize("name", REGISTRY)
def test_inputs_are_normalised_as_the_weights_expect(name):
    classifier = load_classifier(name)
    x = torch.rand(2, 3, *classifier.resize)
    assert torch.allclose(classifier(x), classifier.network((255 * x - 127) / 128), atol=1e-4)


@pytest.mark.parametrize("name", REGISTRY)
def test_gradients_reach_images_of_any_size(name):
    x = torch.rand(1, 3, 192, 192, requires_grad=True)
    load_classifier(name)(x)[0, 5].backward()
    assert x.grad.isfinite().all() and (x.grad != 0).float().mean() > 0.9


@pytest.mark.parametrize("name", REGISTRY)
def test_every_demo_image_is_classified_correctly(name):
    paths = natsorted((ROOT / "demo/images").iterdir(), key=lambda path: path.name)
    labels = np.loadtxt(ROOT / "demo/labels.txt", dtype=int) - 1
    assert len(paths) == len(labels) >= 11 and len(set(labels.tolist())) == len(labels)
    predictions, _ = predict(
        load_classifier(name),
        np.stack([read_image(path, 224) for path in paths]),
        labels,
        torch.device("cpu"),
    )
    assert predictions["label"].tolist() == labels.tolist()


# ---------------------------------------------------------------- the other forms, each of a real object


@pytest.mark.parametrize("name", ["net.ts", "net.pt", "net"])
def test_torchscript(tmp_path, name):
    torch.jit.script(network(10)).save(tmp_path / name)
    check(tmp_path / name, 10, network(10)(IMAGES))


@pytest.mark.parametrize("name", ["net.pt2", "net.pt"])
def test_exported_program(tmp_path, name):
    program = torch.export.export(
        network(10), (IMAGES[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(program, tmp_path / name)
    check(tmp_path / name, 10, network(10)(IMAGES))


def test_code(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\ndef build():\n    torch.manual_seed(0)\n    return "
        "torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(192, 10))\n"
    )
    check(f"{tmp_path / 'mine.py'}:build", 10, network(10)(IMAGES))


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A small vision transformer in transformers format, and its image processor."""
    from transformers import ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("vit")
    save_vit(folder, num_labels=10)
    processor = ViTImageProcessor(
        size={"height": 96, "width": 96}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25], resample=3
    )
    processor.save_pretrained(folder)
    return folder, ViTForImageClassification.from_pretrained(folder).eval(), processor


def test_hugging_face_folder(hugging_face):
    folder, model, processor = hugging_face
    pixels = (IMAGES * 255).round().byte()
    expected = torch.as_tensor(
        np.asarray(processor(list(pixels.permute(0, 2, 3, 1).numpy()), return_tensors="np")["pixel_values"])
    )
    classifier = load_classifier(f"hf:{folder}", 10, 96)
    assert torch.allclose(classifier.preprocess(pixels.float() / 255), expected, atol=1e-5)
    check(f"hf:{folder}", 10, model(pixel_values=classifier.preprocess(IMAGES)).logits.detach())


@pytest.mark.parametrize(
    "settings",
    [
        dict(size={"height": 96, "width": 80}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]),
        dict(do_normalize=False, size={"height": 96, "width": 96}),
        dict(do_rescale=False, size={"height": 96, "width": 96}),
        dict(
            size={"height": 96, "width": 96},
            rescale_factor=1 / 127.5,
            image_mean=[1.0, 1.0, 1.0],
            image_std=[1.0, 1.0, 1.0],
        ),
    ],
)
def test_preprocessing_of_image_processors(settings):
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(**settings)
    height, width = settings["size"]["height"], settings["size"]["width"]
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    classifier = from_processor(torch.nn.Identity(), processor)
    expected = torch.as_tensor(np.asarray(processor(pixels, return_tensors="np")["pixel_values"], np.float32))
    assert torch.allclose(
        classifier(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255),
        expected,
        atol=1e-5 * max(1, expected.abs().max()),
    )


def test_an_image_processor_that_does_something_else_is_refused():
    from transformers import ViTImageProcessor

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
    from PIL import Image

    classifier = from_timm(
        torch.nn.Identity(),
        {
            "input_size": (3, 64, 64),
            "crop_pct": 0.8,
            "interpolation": interpolation,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
    )
    images = torch.rand(2, 3, 150, 150, generator=torch.Generator().manual_seed(1))

    def pass_of(channel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """One pass of Pillow, which clips 8-bit values after each; here without rounding them."""
        return np.asarray(Image.fromarray(channel, mode="F").resize(size, pillow)).clip(0, 1)

    resized = np.stack(
        [[pass_of(pass_of(channel.numpy(), (80, 150)), (80, 80)) for channel in image] for image in images]
    )
    expected = (resized[..., 8:72, 8:72] - np.reshape((0.485, 0.456, 0.406), (3, 1, 1))) / np.reshape(
        (0.229, 0.224, 0.225), (3, 1, 1)
    )
    np.testing.assert_allclose(classifier(images), expected, atol=1e-5)


def test_a_background_class_is_left_out(tmp_path):
    torch.jit.script(network(1001)).save(tmp_path / "net.ts")
    check(tmp_path / "net.ts", 1000, network(1001)(IMAGES)[:, 1:])


@pytest.mark.parametrize(
    "name, message",
    [
        ("resnet1", "unknown classifier 'resnet1'"),
        ("timm:no_such_net", "expected timm and torchvision installed"),
        ("hf:nowhere", "cannot be loaded .*; expected a folder in transformers format"),
        ("{folder}/none.pt2", "No such file"),
        ("{folder}/bad.ts", "cannot be loaded .*a program of torch.export.save or torch.jit.save"),
        (
            "{folder}/weights.pt",
            "no network in it.*; expected .*FILE.py:FUNCTION with a function that builds",
        ),
        ("{folder}/none.py:build", "No such file"),
        ("{folder}/code.py:none", "it has no function 'none'"),
        ("{folder}/code.py:number", "returned int, and no torch.nn.Module"),
        (
            "{folder}/code.py:wrong",
            r"returns a tensor \(5, 3, 96, 96\) of torch.float32; expected float logits",
        ),
        ("{folder}/net.ts", "has 7 outputs, but there are 10 classes; give --captions"),
        ("hf:{folder}", "cannot be loaded"),
    ],
)
def test_classifiers_that_cannot_be_had_are_named(tmp_path, name, message):
    (tmp_path / "bad.ts").write_text("no program")
    torch.save(network(10).state_dict(), tmp_path / "weights.pt")
    (tmp_path / "code.py").write_text(
        "import torch\n\n\ndef number():\n    return 1\n\n\ndef wrong():\n    return torch.nn.Identity()\n"
    )
    torch.jit.script(network(7)).save(tmp_path / "net.ts")
    with pytest.raises(InputError, match=message):
        load_classifier(name.format(folder=tmp_path), 10, 96)


def test_aliases_name_models_of_timm():
    assert set(ALIASES) >= {
        "resnet",
        "vgg",
        "mobile",
        "inception",
        "convnext",
        "vit",
        "swin",
        "deit-b",
        "deit-s",
        "mixer-b",
        "mixer-l",
        "adv-inception",
        "ens-adv-inception-resnet",
    }
    assert check_name("resnet") == "timm:resnet50.tv_in1k"
