"""Classifiers that come from elsewhere: timm, transformers, exported programs, and a user's own code.

Each function returns a module that maps images `(B, 3, H, W)` in [0, 1] to logits, as its authors would call
it; what is checked of all of them alike is in registry.py.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path

import torch

from classifiers.preprocessing import Preprocessed, from_processor, from_timm
from common.checkpoints import check_loaded, check_weights, stay_offline_if_out_of_reach
from common.errors import ClassifierError, one_line
from data.classes import IMAGENET_CLASSES

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")}
OWN_NAMES = {*PACKAGES, *(path.stem for path in ROOT.glob("*.py"))}


def timm_classifier(name: str) -> Preprocessed:
    """A model of timm with its own weights and the evaluation transform of its `pretrained_cfg`."""
    try:
        import timm
    except (ImportError, RuntimeError, OSError) as error:
        raise ClassifierError(
            f"classifier 'timm:{name}' needs timm and torchvision, and they cannot be imported "
            f"({one_line(error)}); "
            "pip install timm torchvision, or give a classifier of another form"
        ) from None
    elsewhere = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if (
        not elsewhere
        and name not in timm.list_models(pretrained=True)
        and name.split(".")[0] not in timm.list_models()
    ):
        raise ClassifierError(
            f'timm knows no model {name!r}; python -c "import timm; '
            f"print(timm.list_models('*{name.split('.')[0][:6]}*', pretrained=True))\" lists some"
        )
    try:
        network = timm.create_model(name, pretrained=True)
    except Exception as error:  # timm passes on what the hub, the loader or a configuration raises
        raise ClassifierError(
            f"the weights of 'timm:{name}' are not here and cannot be fetched ({one_line(error)}); give a "
            f"local folder in transformers format as hf:FOLDER, or a program FILE.pt2"
        ) from None
    classifier = from_timm(network, timm.data.resolve_model_data_config(network))
    classifier.class_names = names_of_timm(network)
    return classifier


def names_of_timm(network: torch.nn.Module) -> tuple[str, ...] | None:
    """The names that a model of timm has for its outputs, where it has some: those of its configuration,
    which are often WordNet ids, or those of ImageNet.
    """
    configuration = network.pretrained_cfg
    if configuration.get("label_names"):
        return tuple(map(str, configuration["label_names"]))
    # timm's own way to say what weights were trained on is the end of their tag
    return IMAGENET_CLASSES if str(configuration.get("tag")).endswith("in1k") else None


def hugging_face_classifier(name: str) -> torch.nn.Module:
    """An image classifier in transformers format, from a folder or the hub, with the preprocessing of its own
    image processor.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not Path(name).is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        stay_offline_if_out_of_reach()
    elif not Path(name).is_dir():
        raise ClassifierError(
            f"classifier 'hf:{name}': there is no folder {name!r}; give hf:FOLDER with a folder in "
            f"transformers format, or hf:ORG/NAME"
        )
    try:
        if Path(name).is_dir():
            check_weights(Path(name), "model")
        network, info = AutoModelForImageClassification.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        check_loaded(info)
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        classifier = (
            from_timm(Logits(network), processor.data_config)
            if type(processor).__name__ == "TimmWrapperImageProcessor"
            else from_processor(Logits(network), processor, name)
        )
    except ClassifierError:
        raise
    # whatever a configuration makes the loaders stumble over, which is not foreseeable
    except Exception as error:
        where = (
            "cannot be loaded"
            if Path(name).is_dir()
            else "is no folder here, and the model hub did not give it"
        )
        raise ClassifierError(
            f"classifier 'hf:{name}' {where} ({one_line(error)}); give a folder that holds the model in "
            f"transformers format with safetensors weights"
        ) from None
    if network.config.problem_type == "regression":
        raise ClassifierError(
            f"classifier 'hf:{name}' says that it is a regression, whose outputs are no classes; give a "
            f"classifier"
        )
    labels = [network.config.id2label[k] for k in sorted(network.config.id2label)]
    classifier.class_names = None if labels[0] == "LABEL_0" else tuple(labels)
    return classifier


class Logits(torch.nn.Module):
    """A model of transformers that returns its logits alone."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=images).logits


class Program(torch.nn.Module):
    """A program of torch.export, which is moved by a pass of its own and knows neither eval mode nor
    hooks.
    """

    def __init__(self, program: torch.export.ExportedProgram):
        super().__init__()
        self.program, self.callables = program, {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.device not in self.callables:
            from torch.export.passes import move_to_device_pass

            self.callables[images.device] = move_to_device_pass(self.program, str(images.device)).module()
        return self.callables[images.device](images)


class Script(torch.nn.Module):
    """A program of TorchScript, which bears no hooks itself."""

    def __init__(self, program: torch.jit.ScriptModule):
        super().__init__()
        self.program = program

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.program(images)


def program_classifier(path: str) -> torch.nn.Module:
    """A program that maps images `(B, 3, H, W)` in [0, 1] to logits."""
    if not Path(path).is_file():
        raise ClassifierError(f"classifier {path!r}: there is no such file")
    try:
        if path.endswith(".pt2"):
            return Program(torch.export.load(path))
        return Script(torch.jit.load(path, map_location="cpu"))
    except Exception as error:  # both raise whatever their file made them
        kind = "torch.export.save" if path.endswith(".pt2") else "torch.jit.save"
        raise ClassifierError(
            f"classifier {path!r} cannot be loaded ({one_line(error)}); expected a file that {kind} wrote"
        ) from None


def load_function(
    shown: str, path: str, function: str, error: type[ValueError] = ClassifierError
) -> tuple[Callable, Place]:
    """A function in a file of the user's, and where it is to be called.

    Args:
        shown: what a message calls it.
        error: what is raised where there is none, or the file cannot be executed.
    """
    if not Path(path).is_file():
        raise error(f"{shown}: there is no file {path!r}")
    place = Place(Path(path).resolve())
    try:
        with place.entered():
            module = place.execute()
    except (Exception, SystemExit) as raised:  # the code may raise whatever it likes
        raise error(
            f"{shown} raises {type(raised).__name__} when it is loaded ({one_line(raised)})"
        ) from None
    if not callable(getattr(module, function, None)):
        raise error(f"{shown}: the file has no function {function!r}")
    return getattr(module, function), place


def code_classifier(path: str, function: str) -> torch.nn.Module:
    """What a function in a file of the user's returns; weights that it draws are the same each time."""
    name = f"{path}:{function}"
    make, place = load_function(f"classifier {name!r}", path, function)
    try:
        with place.entered(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            classifier = make()
    except (Exception, SystemExit) as error:  # the code may raise whatever it likes
        hint = (
            "; its keys begin with 'module.', as DataParallel saves them: remove that before loading them"
            if "module." in str(error) and "state_dict" in str(error)
            else ""
        )
        raise ClassifierError(
            f"classifier {name!r} raises {type(error).__name__} when it is loaded ({one_line(error)}){hint}"
        ) from None
    if isinstance(classifier, torch.nn.DataParallel):
        classifier = classifier.module
    if not isinstance(classifier, torch.nn.Module):
        raise ClassifierError(
            f"classifier {name!r}: the function returned {type(classifier).__name__}; expected a "
            f"torch.nn.Module that maps images (B, 3, H, W) in [0, 1] to logits"
        )
    return UserCode(classifier, place)


class UserCode(torch.nn.Module):
    """A classifier that code of the user's made, called where its own modules are in place, since it may
    import some only then.
    """

    def __init__(self, classifier: torch.nn.Module, place: Place):
        super().__init__()
        self.classifier, self.place = classifier, place
        self.class_names = getattr(classifier, "class_names", None)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with self.place.entered():
            return self.classifier(images)


class Place:
    """Where a file of the user's is executed as `python FILE` would: modules and packages beside it come
    before all others, also before those of this project that have their names. What this project has
    imported stays its own, and so does what another file of the user's has.
    """

    def __init__(self, file: Path):
        self.file = file
        self.modules: dict[str, object] = {}  # theirs, which nobody else sees
        # A folder without __init__.py is a package only where no other place on the path has one of its name:
        # so this project is looked through after the path, and not as a part of it.
        self.path = [str(file.parent), *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]
        # what was hidden the last time, and of which modules: there are thousands, and an attack comes in
        # hundreds of times an image
        self.looked_through: tuple[int, str] | None = None
        self.to_hide: list[str] = []

    def execute(self) -> object:
        """The file's module."""
        specification = importlib.util.spec_from_file_location(self.file.stem, self.file)
        module = importlib.util.module_from_spec(specification)
        sys.modules[self.file.stem] = module  # dataclasses look their module up
        specification.loader.exec_module(module)
        return module

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, names mean what they mean to the user's file."""
        present = (len(sys.modules), next(reversed(sys.modules)))
        if present != self.looked_through:
            ours = [name for name, module in sys.modules.items() if is_ours(name, module)]
            self.to_hide = [*ours, *self.modules, self.file.stem]
        hidden = {name: sys.modules.pop(name) for name in self.to_hide if name in sys.modules}
        count = len(sys.modules)
        before = None if present == self.looked_through else set(sys.modules)
        sys.modules.update(self.modules)
        path, finders = sys.path, sys.meta_path
        sys.path, sys.meta_path = self.path, [*finders, OwnModules]
        try:
            yield
        finally:
            sys.path, sys.meta_path, self.path = path, finders, sys.path
            if before is None and len(sys.modules) == count + len(self.modules):
                new = [name for name in self.modules if name in sys.modules]  # nothing has been imported
            else:
                before = before or set(list(sys.modules)[:count])
                new = [name for name in sys.modules if name not in before and self.is_theirs(name)]
            self.modules = {name: sys.modules.pop(name) for name in new}
            sys.modules.update(hidden)
            self.looked_through = (len(sys.modules), next(reversed(sys.modules)))

    def is_theirs(self, name: str) -> bool:
        """Whether a module is of the user's own files, or a copy of one of this project's."""
        place = location(sys.modules[name])
        below = place is not None and self.file.parent in place.parents
        installed = name.split(".")[0] in sys.stdlib_module_names or "site-packages" in getattr(
            place, "parts", ()
        )
        return has_own_name(name) or (below and not installed)


class OwnModules:
    """Finds this project's modules, for code of the user's that imports some and has none of their names."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: object = None) -> object:
        return PathFinder.find_spec(name, [str(ROOT)]) if path is None else None


def has_own_name(name: str) -> bool:
    """Whether a module's name, or that of the package it lies in, is the name of a module of this project."""
    return name.split(".")[0] in OWN_NAMES


def location(module: object) -> Path | None:
    """The file of a module, or the folder of a package without __init__.py."""
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return next((Path(place) for place in places if place), None)


def is_ours(name: str, module: object) -> bool:
    """Whether it is a module of this project, and not another one of its name."""
    place = location(module) if has_own_name(name) else None
    return place is not None and place.parent in (ROOT, *(ROOT / package for package in PACKAGES))
