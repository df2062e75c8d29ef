"""Try the network and the optimizer in the parent process, before any rank starts."""

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchinfo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from cifar_exp.config.schema import Config
from cifar_exp.data.batches import EVALUATION_BATCH, Normalization, resized, scaled_size, shard
from cifar_exp.data.dataset_files import DatasetFiles
from cifar_exp.errors import ConfigError
from cifar_exp.models.build import arrange, seeded
from cifar_exp.runs.components import Components
from cifar_exp.runs.optimizer_check import check_optimizer
from cifar_exp.runs.user_code import refusing
from cifar_exp.system.accelerator import device_of, layout, one_thread, resolve_precision
from cifar_exp.training.evaluation import autocast
from cifar_exp.training.plan import Plan

OTHER = "Correct it, or set model to another network"
CPU = torch.device("cpu")
MOST_TRIED = 1024  # images of a whole batch that is tried
OF_DEVICES = (
    "cuda",
    "nvidia",
    "gpu",
    "mps",
    "triton",
    "device",
    "cpu",
)  # in errors of a network that works only on a GPU


@dataclass(frozen=True)
class Tried:
    """A network that passed the trial.

    Attributes:
        model: the network.
        unused: names of the parameters that got no gradient.
    """

    model: nn.Module
    unused: tuple[str, ...]


@one_thread()
def layer_shapes(model: nn.Module, image_size: tuple[int, int]) -> list[tuple[str, tuple[int, ...], int]]:
    """Run the network on two black images and list its layers.

    Args:
        model: the network.
        image_size: height and width in pixels.

    Returns:
        For each layer its type, its output shape without the batch dimension, and its number of parameters.

    Raises:
        RuntimeError: the layers cannot be listed.
    """
    batch = torch.zeros(2, 3, *image_size)
    summary = torchinfo.summary(model, input_data=batch, verbose=0, mode="eval", depth=10)
    leaves = [layer for layer in summary.summary_list if layer.is_leaf_layer]
    return [(layer.class_name, tuple(layer.output_size[1:]), layer.num_params) for layer in leaves]


def checked_model(config: Config, components: Components, classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Build the network as each rank does.

    Raises:
        ConfigError: the network rejects its settings, or has nothing to train.
    """
    target = config.model["_target_"]
    with refusing(f"model: {target} cannot be built", config.trusted_modules, OTHER):
        model: object = seeded(components.make_model, classes, config.seed, image_size)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: {target} returned {_kind(model)}; it must return a torch.nn.Module. {OTHER}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ConfigError(
                f"model: {name} of {target} still has no shape after a forward pass in evaluation mode. Use a layer "
                f"that knows its sizes"
            )
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not trained:
        raise ConfigError(f"model: {target} has no parameter to train (requires_grad). {OTHER}")
    for name, value in trained.items():
        if not value.is_floating_point():
            raise ConfigError(f"model: {name} of {target} is {value.dtype}, and only real numbers are trained. {OTHER}")
    return model


@one_thread()
def try_out(config: Config, components: Components, plan: Plan, data: DatasetFiles, accelerator: str) -> Tried:
    """Build the network; train and evaluate it on a few images as a rank would, on the CPU.

    Raises:
        ConfigError: the network or the optimizer cannot work.
    """
    size = scaled_size(data.image_size, plan.image_scales[-1])
    model = checked_model(config, components, len(data.classes), size)
    unused: tuple[str, ...] = ()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            unused = _Trial(config, plan, data, accelerator, model).run(components)
    except ConfigError as error:
        if accelerator == "cpu" or not any(word in str(error.__cause__).lower() for word in OF_DEVICES):
            raise
        model = checked_model(config, components, len(data.classes), size)  # an incomplete step may have changed it
    return Tried(model, unused)


@dataclass(frozen=True)
class _Trial:
    config: Config
    plan: Plan
    data: DatasetFiles
    accelerator: str
    model: nn.Module

    def run(self, components: Components) -> tuple[str, ...]:
        """Do once everything that a rank does with a network. Returns the parameters that got no gradient."""
        trusted, target = self.config.trusted_modules, self.config.model["_target_"]
        with refusing(f"model: {target} cannot be sent to the ranks", trusted, "Define it at the top of its module"):
            pickle.dumps(components.make_model)
        with refusing(f"model: {target} cannot be laid out", trusted, OTHER):
            arrange(self.model.to(CPU), layout(device_of(self.accelerator, 0)))
        self._check_state()
        if self.config.train.weight_averaging:
            with refusing("train.weight_averaging: the network cannot be copied", trusted, "Set it to 0"):
                copy.deepcopy(self.model)
        scales, shapes = self.plan.image_scales, _shapes(self.model)
        # Train, evaluate, train: state that one pass leaves behind may break the next.
        batch = self._first_pass(scales[0])
        unused = tuple(name for name, value in self.model.named_parameters() if value.requires_grad and no_grad(value))
        check_optimizer(self.config, components.make_optimizer, self.model, self.plan.learning_rates[0])
        self.model.zero_grad(set_to_none=True)
        for scale in dict.fromkeys(scales):
            self._at_scale(scale, self._evaluate)
        self._at_scale(scales[-1], partial(self._train, count=batch))
        self._check_shapes(shapes)
        return unused

    def _first_pass(self, scale: float) -> int:
        """Train on a few images; if that fails, on a whole batch: ghost batch norms split a batch in equal parts.

        Returns:
            The number of images that the network can be trained on.
        """
        whole = self.plan.per_device_batch_size
        few = _few(whole)
        try:
            self._at_scale(scale, partial(self._train, count=few))
        except ConfigError as error:
            if not few < whole <= MOST_TRIED:
                raise
            try:
                self._at_scale(scale, partial(self._train, count=whole))
            except ConfigError:
                raise error from error.__cause__
            return whole
        return few

    def _check_shapes(self, before: Mapping[str, tuple[int, ...]]) -> None:
        """Check that training has left the shapes of the state as they were, so that a checkpoint can be loaded."""
        after = _shapes(self.model)
        for name in before.keys() | after.keys():
            then, now = (shapes.get(name, "none") for shapes in (before, after))
            if then != now:
                raise ConfigError(
                    f"model: {name} of {self.config.model['_target_']} changes its shape while it trains, from {then} "
                    f"to {now}, so no checkpoint could be loaded. Give it its shape from the start"
                )

    def _check_state(self) -> None:
        """Check that a checkpoint can hold the network's state and that it can be loaded again."""
        trusted, target = self.config.trusted_modules, self.config.model["_target_"]
        remedy = "Return tensors, numbers, texts, lists or dicts of them from get_extra_state"
        with refusing(f"model: the state of {target} cannot be saved and loaded", trusted, remedy):
            state = self.model.state_dict()
            others = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
            stored = io.BytesIO()
            torch.save(others, stored)
            stored.seek(0)
            self.model.load_state_dict(state | torch.load(stored, weights_only=True))

    def _at_scale(self, scale: float, action: Callable[[float], None]) -> None:
        try:
            action(scale)
        except ConfigError as error:
            if scale == 1:
                raise
            raise ConfigError(
                f"train.image_scales: at scale {scale:g} the images are too small for this network. Set larger "
                f"scales, as in train.image_scales=[0.5,0.75,1]. {error}"
            ) from error.__cause__

    def _train(self, scale: float, count: int) -> None:
        self.model.train()
        logits = self._logits(count, scale, "in training")
        labels = torch.arange(count) % len(self.data.classes)
        target = self.config.model["_target_"]
        if not logits.requires_grad:
            raise ConfigError(f"model: the outputs of {target} do not depend on its parameters. {OTHER}")
        with refusing(f"model: the backward pass of {target} fails", self.config.trusted_modules, OTHER):
            smoothing = self.config.train.label_smoothing
            F.cross_entropy(logits.float(), labels, label_smoothing=smoothing).backward()
        if all(no_grad(parameter) for parameter in self.model.parameters()):
            raise ConfigError(f"model: no parameter of {target} gets a gradient. {OTHER}")

    def _evaluate(self, scale: float) -> None:
        self.model.eval()
        with torch.inference_mode():
            for count in self._evaluated() if scale == self.plan.image_scales[-1] else [2]:
                self._logits(count, scale, "in evaluation")

    def _evaluated(self) -> list[int]:
        """The numbers of images to evaluate: one for each kind of a rank's batches; see :func:`_few`."""
        ranks = self.plan.world_size
        shares = [len(shard(count, rank, ranks)) for count in self._counts() for rank in range(ranks)]
        batches = {share % EVALUATION_BATCH for share in shares} | {min(share, EVALUATION_BATCH) for share in shares}
        return sorted({_few(batch) for batch in batches if batch}, reverse=True)

    def _counts(self) -> list[int]:
        return [self.data.test_count, self.data.validation_count]

    def _logits(self, count: int, scale: float, mode: str) -> Tensor:
        """The network's outputs for ``count`` images of noise, checked."""
        images = self._images(count, scale)
        shape, target = " x ".join(map(str, images.shape)), self.config.model["_target_"]
        # A GPU's half precision is not tried: the CPU computes it in another way.
        precision = resolve_precision(self.config.train.precision, CPU) if self.accelerator == "cpu" else torch.float32
        with (
            refusing(f"model: {target} fails on {shape} images {mode}", self.config.trusted_modules, OTHER),
            autocast(CPU, precision),
        ):
            logits: object = self.model(images)
        classes = len(self.data.classes)
        wanted = f"{mode} it must return a tensor of real numbers of shape ({count}, {classes}), the logits alone"
        is_right = isinstance(logits, Tensor) and logits.is_floating_point() and tuple(logits.shape) == (count, classes)
        if not is_right:
            raise ConfigError(f"model: {target} returns {_kind(logits)} for {shape} images; {wanted}. {OTHER}")
        assert isinstance(logits, Tensor)
        if not logits.isfinite().all():
            raise ConfigError(f"model: {target} returns NaN or infinity {mode}, before any training. {OTHER}")
        return logits

    def _images(self, count: int, scale: float) -> Tensor:
        pixels = torch.randint(0, 256, (count, 3, *self.data.image_size))
        normalization = Normalization.of(self.config.train.normalization, self.data.mean, self.data.std)
        return resized(normalization(pixels), scale)


def _few(batch: int) -> int:
    """The number of images that stands for a batch: 3 for an odd size, 4 for an even one, all of a smaller batch."""
    return batch if batch <= 2 else 4 - batch % 2


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def no_grad(parameter: Tensor) -> bool:
    """Whether no gradient has reached the parameter."""
    return parameter.grad is None


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"an object of type {type(value).__name__}"
