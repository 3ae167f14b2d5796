"""The towers of a training step as CUDA graphs: a step launches two graphs instead of thousands of kernels.

At small batches, a CPU launches kernels more slowly than a GPU runs them. A graph is launched at once, but it replays
the same kernels on the same memory. So it works for inputs of one shape, which are copied to its own tensors, and the
captions of a chunk are padded to one of a few numbers of tokens (`pad_captions`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import CLIP
from open_clip.transformer import PatchDropout as OpenClipPatchDropout
from open_clip.transformer import TextTransformer, VisionTransformer
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from clip_retrieval.errors import RunError
from clip_retrieval.log import log
from clip_retrieval.models.pooled import Positions
from clip_retrieval.models.projection import text_part
from clip_retrieval.models.towers import RetrievalModel

MAX_SHAPES = 16
SMALLEST_STEP = 16  # tokens
TOLERANCE = 0.01  # between a replayed feature and a computed one, in bf16


def can_replay(model: RetrievalModel) -> bool:
    """Whether nothing in the towers waits for a GPU, or reads the memory of the CPU, so that a graph can replay them.

    True for the ViTs of open_clip and timm with open_clip's text towers.
    """
    visual, text = model.clip.visual, text_part(model.clip)
    trunk, dropout = getattr(visual, "trunk", visual), getattr(visual, "patch_dropout", None)
    return (
        type(trunk) in (VisionTransformer, TimmVisionTransformer)
        and not isinstance(dropout, OpenClipPatchDropout)  # it draws on the CPU
        and isinstance(text, (CLIP, TextTransformer))
        and not any(isinstance(module, _BatchNorm) for module in model.modules())
    )


class Recorder:
    """Records functions as CUDA graphs on one device; all graphs share their memory."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Return a function that launches the kernels that `function` launches; none of them runs now."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, which decode or pin images, may wait for the device at the same time
        settings: dict[str, Any] = {"stream": self._stream, "pool": self._pool, "capture_error_mode": "thread_local"}
        with torch.cuda.device(self._stream.device), torch.cuda.graph(graph, **settings):
            function()
        return graph.replay

    def free_memory(self) -> float:
        """Return the free memory of the device, in bytes."""
        return torch.cuda.mem_get_info(self._stream.device)[0]


class GraphedTowers:
    """The towers of a training step, replayed as CUDA graphs; called like the towers.

    The first chunk of a shape is computed without a graph. The second one is captured, and replayed like all later
    ones. After MAX_SHAPES shapes, further ones are computed without graphs. So are all, if the memory would not suffice
    for a chunk of another shape beside the graphs.

    Graphs share their memory, because the backward pass of a chunk follows its forward pass: no other graph is replayed
    in between. Gradients are added to those of the master weights.

    Args:
        towers: the model that computes, on a GPU.
        model: the model with the master weights, which may be the same.
        recorder: records a function, to call it again.
    """

    def __init__(self, towers: RetrievalModel, model: RetrievalModel, recorder: Recorder):
        self._towers = towers
        pairs = [pair for pair in zip(towers.parameters(), model.parameters(), strict=True) if pair[0].requires_grad]
        self._parameters: list[Tensor] = [own for own, _ in pairs]
        self._gradients = _Gradients([master for _, master in pairs])
        self._recorder = recorder
        self._inputs: dict[Any, Tensor] = {}
        self._seen: Counter[Any] = Counter()
        self.captured: dict[Any, _Captured] = {}
        self._fits = True
        self._leaf = torch.zeros((), requires_grad=True)  # an input with a gradient, or _Replay has no backward pass

    def __call__(self, images: Tensor, texts: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode the images and captions of a chunk, see `RetrievalModel.forward`.

        Raises RunError if the towers cannot be captured.
        """
        inputs, captions = [images, texts], len(texts)
        if lengths is not None and self._towers.packs_text:
            texts, lengths = pad_captions(texts, lengths)
            positions = Positions.of(lengths, texts.device, texts.shape[1])
            inputs = [images, texts, positions.index, positions.starts]
        shape = tuple((*tensor.shape, tensor.dtype) for tensor in inputs)
        self._seen[shape] += 1
        if shape not in self.captured and self._fits and self._seen[shape] > 1 and len(self.captured) < MAX_SHAPES:
            self._capture(shape, inputs)
        if shape not in self.captured:
            image_features, text_features = self._run(inputs)
            return image_features, text_features[:captions]
        return _Replay.apply(self._leaf, self.captured[shape], inputs, captions)

    def _run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        images, texts, *packed = inputs
        return self._towers(images, texts, Positions(packed[0], packed[1], texts.shape[1]) if packed else None)

    def _capture(self, shape: Any, inputs: Sequence[Tensor]) -> None:
        """Capture a shape, or drop all graphs if they take too much memory."""
        keys = [(number, *key) for number, key in enumerate(shape)]
        own = [self._inputs.setdefault(key, torch.empty_like(tensor)) for key, tensor in zip(keys, inputs)]
        for static, tensor in zip(own, inputs):
            static.copy_(tensor)
        try:
            captured = _Captured(self._run, own, self._parameters, self._gradients, self._recorder)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an operation that cannot be captured
            problem = str(error).splitlines()[0]
            raise RunError(f"--compile: the towers cannot be replayed as a CUDA graph ({problem}); drop it") from error
        self.captured[shape] = captured
        moments = 12 * sum(parameter.numel() for parameter in self._parameters)  # and an average of the weights
        if self._recorder.free_memory() < captured.activation_bytes + moments:
            log.warning("--compile: not enough memory for CUDA graphs; reduce --batch_size, or set --grad_cache")
            self._fits = False
            self.captured.clear()


class _Captured:
    """The graphs of the forward and the backward pass for one shape.

    Attributes:
        features: the output of the forward pass, valid until the next one.
        activation_bytes: memory between the forward and the backward pass.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]],
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        gradients: _Gradients,
        recorder: Recorder,
    ):
        self._inputs = inputs
        self._accumulated = gradients
        seed = torch.initial_seed()

        # compute once without a graph: this initializes libraries, and shows which parameters have a gradient
        before = _allocated(inputs[0].device)
        with torch.enable_grad():
            computed = run(inputs)
        self.activation_bytes = _allocated(inputs[0].device) - before
        self._differentiable = [features.requires_grad for features in computed]
        self._gradients = [torch.zeros_like(features) for features in computed if features.requires_grad]
        used = [number for number, found in enumerate(self._differentiate(computed, parameters)) if found is not None]
        gradients.allocate(used)
        expected = [features.detach() for features in computed]
        del computed  # an autograd graph of another stream must not be alive during the capture

        # capture
        def forward() -> None:
            with torch.enable_grad():
                self.features = run(inputs)

        def backward() -> None:
            found = self._differentiate(self.features, [parameters[number] for number in used])
            gradients.add(used, [gradient for gradient in found if gradient is not None])

        self._forward, self._backward = recorder(forward), recorder(backward)
        self.features = self.features[0].detach(), self.features[1].detach()

        # check the first replay, which has the random numbers of the computation
        for features in self.features:
            features.fill_(torch.nan)
        torch.manual_seed(seed)
        self._forward()
        if not all(torch.allclose(*pair, atol=TOLERANCE) for pair in zip(expected, self.features)):
            raise RuntimeError("the replayed features differ from the computed ones")
        torch.manual_seed(seed)

    def _differentiate(self, features: Sequence[Tensor], parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
        outputs = [each for each in features if each.requires_grad]
        return torch.autograd.grad(outputs, parameters, self._gradients, allow_unused=True)

    def replay_forward(self, inputs: Sequence[Tensor]) -> None:
        """Compute `features` from inputs of the captured shape."""
        for own, tensor in zip(self._inputs, inputs, strict=True):
            own.copy_(tensor, non_blocking=True)
        self._forward()

    def replay_backward(self, gradients: Sequence[Tensor]) -> None:
        """Add the gradients of the parameters, given those of the features (of the first rows, the rest are zero)."""
        self._accumulated.attach()
        used = [gradient for gradient, needed in zip(gradients, self._differentiable) if needed]
        for own, gradient in zip(self._gradients, used, strict=True):
            own[: len(gradient)].copy_(gradient)
        self._backward()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class _Gradients:
    """The gradients of the master weights, in memory that stays the same from step to step."""

    def __init__(self, masters: Sequence[Tensor]):
        self._masters = masters
        self._sums: dict[int, Tensor] = {}

    def allocate(self, numbers: Sequence[int]) -> None:
        """Allocate the gradients of the masters with these numbers."""
        for number in numbers:
            if number not in self._sums:
                self._sums[number] = torch.zeros_like(self._masters[number])

    def attach(self) -> None:
        """Make them the gradients of the masters, starting from those that are there."""
        new = []
        for number, own in self._sums.items():
            gradient = self._masters[number].grad
            if gradient is own:
                continue
            if gradient is None:
                new.append(own)
            else:
                own.copy_(gradient)
            self._masters[number].grad = own
        if new:
            torch._foreach_zero_(new)

    def add(self, numbers: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Add gradients to those of the masters with these numbers."""
        torch._foreach_add_([self._sums[number] for number in numbers], list(gradients))


class _Replay(torch.autograd.Function):
    """Replays the forward pass of a chunk and, in the backward pass, its backward pass."""

    @staticmethod
    def forward(
        ctx: Any, leaf: Tensor, captured: _Captured, inputs: Sequence[Tensor], captions: int
    ) -> tuple[Tensor, Tensor]:
        ctx.captured = captured
        captured.replay_forward(inputs)
        images, texts = captured.features
        return images.clone(), texts[:captions].clone()  # the next replay overwrites them

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None]:
        ctx.captured.replay_backward(gradients)
        return None, None, None, None


def pad_captions(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Add captions, so that few different numbers of tokens occur. What they contain does not matter.

    The number of tokens becomes a multiple of half the number of captions: about 2% more for captions of 12 tokens. The
    number of captions follows from the shape of `tokens`, (n, length); lengths: int64 (n,) on the CPU.
    """
    captions, longest = tokens.shape
    if longest == 1:
        return tokens, lengths
    multiple = max(SMALLEST_STEP, captions // 2)
    # each further caption has at least one token, and together they hold up to `multiple` - 1 more
    further = -(-(multiple - 1) // (longest - 1))
    missing = -(int(lengths.sum()) + further) % multiple
    filled = torch.arange(further + 1).mul(longest - 1).clamp(max=missing).diff() + 1
    return F.pad(tokens, (0, 0, 0, further)), torch.cat([lengths, filled])
