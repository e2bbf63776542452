"""Which consecutive steps of a plan one launch can stand for, where a step of the engine has a single token.

The plan keeps its steps: prompts, larger batches, long contexts and debug runs launch them one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from fp8.builder.engine import Buffer, Step
from fp8.plugins.base import PluginError, Tensor
from fp8.plugins.decode_layers.plugin import DecodeLayers
from fp8.plugins.decode_layers.sizes import NEXT
from fp8.plugins.decode_layers_ranks.plugin import DecodeLayersRanks

NORMS = ("norm_quant", "all_reduce_norm_quant")
Found = tuple[int, int, Step]  # the first step, how many, and the one that stands for them


class Refused(ValueError):
    """Why there is nothing to merge: one sentence."""


def find(steps: Sequence[Step], buffers: Mapping[str, Buffer]) -> Found:
    """The layers from the first attention to what comes after the last one. Raises Refused."""
    first = next((i for i, step in enumerate(steps) if step.plugin == "attention"), None)
    if first is None:
        raise Refused("there is no attention")
    walk = _Walk(steps, buffers, first)
    layers = [walk.layer()]
    while walk.goes_on():
        layers[-1] += walk.following()
        layers.append(walk.layer())
    layers[-1] += ("",) * NEXT
    plugin = walk.plugin(len(layers))
    step = walk.merged(plugin, layers)
    types = [Tensor(buffers[n].dtype, buffers[n].shape) if n else None for n in step.inputs]
    try:
        plugin.check(types)
    except PluginError as error:
        raise Refused(str(error)) from None
    return first, walk.at - first, step


class _Walk:
    """Goes through the steps from `at` on and takes down what each layer reads."""

    def __init__(self, steps: Sequence[Step], buffers: Mapping[str, Buffer], first: int) -> None:
        self.steps, self.buffers, self.first, self.at = steps, buffers, first, first
        self.readers = Counter(name for step in steps for name in set(step.inputs))
        self.places = steps[first].inputs[1:8]
        self.attention = dict(steps[first].attributes)
        self.norms: set[tuple[float, int]] = set()  # epsilon, and over how many ranks it sums up: 0, none
        self.start = steps[first].inputs[0], ""  # qkv and residual, as the first layer takes them
        self.x, self.residual = self.start

    def layer(self) -> tuple[str, ...]:
        attention = self._take(["attention"], lambda s: s.attributes == self.attention and s.attributes["quant_out"])
        if attention.inputs[1:8] != self.places or attention.inputs[0] != self.x:
            raise Refused(f"{attention.name} reads other rows than the layer before left")
        self.x = attention.outputs[0]
        o, norm = self._linear("gemm", "gemm_send"), self._norm()
        gate_up = self._linear("gemm_swiglu", fits=lambda s: s.attributes["quant"] == "static")
        down = self._linear("gemm", "gemm_send")
        return (*attention.inputs[8:], *o, *norm, *gate_up, *down)

    def goes_on(self) -> bool:
        """Whether another layer follows: a norm, a linear, attention."""
        ahead = [step.plugin for step in self.steps[self.at : self.at + 3]]
        return ahead[1:] == ["gemm", "attention"] and ahead[0] in NORMS

    def following(self) -> tuple[str, ...]:
        return (*self._norm(), *self._linear("gemm"))

    def plugin(self, layers: int) -> DecodeLayers:
        a = self.attention
        heads = {name: a[name] for name in ("num_heads", "num_kv_heads", "head_dim", "softmax_scale", "out_dtype")}
        ((epsilon, world),) = self.norms
        if world:
            return DecodeLayersRanks(**heads, layers=layers, epsilon=epsilon, world=world)
        return DecodeLayers(**heads, layers=layers, epsilon=epsilon)

    def merged(self, plugin: DecodeLayers, layers: Sequence[tuple[str, ...]]) -> Step:
        shared = (self.start[0], self.start[1], *self.places)
        inputs = (*shared, *(name for layer in layers for name in layer))
        name = f"{self.steps[self.first].name} to {self.steps[self.at - 1].name}"
        return Step(name, plugin.name, plugin.attributes(), inputs, (self.x, self.residual))

    def _take(self, plugins: Sequence[str], fits: Callable[[Step], bool]) -> Step:
        if self.at == len(self.steps):
            raise Refused(f"the plan ends where {plugins[0]} should come")
        step = self.steps[self.at]
        if step.plugin not in plugins or not fits(step):
            what = f"{step.name} is {step.plugin} {step.attributes}"
            raise Refused(f"{what}, which the kernel of whole layers does not compute there")
        self.at += 1
        return step

    def _alone(self, name: str) -> None:
        if self.readers[name] > 1 or self.buffers[name].kind != "activation":
            raise Refused(f"{name} is read elsewhere, too")

    def _linear(self, *plugins: str, fits: Callable[[Step], bool] = lambda _: True) -> tuple[str, ...]:
        """Its weight, the scale of x, those of its rows; and of a SwiGLU the scale of what comes out."""
        out_dtype = self.attention["out_dtype"]
        wanted = lambda s: s.attributes["accumulation"] == "fast" and s.attributes["out_dtype"] == out_dtype and fits(s)
        step = self._take(plugins, wanted)
        x, weight, x_scale, w_scale, bias, *out_scale = step.inputs
        if x != self.x:
            raise Refused(f"{step.name} does not read {self.x}")
        if bias:
            raise Refused(f"{step.name} has a bias")
        self._alone(x)
        self.x = step.outputs[0]
        return (weight, x_scale, w_scale, *out_scale)

    def _norm(self) -> tuple[str, ...]:
        def fits(step: Step) -> bool:
            a = step.attributes
            if a.get("fp8_tokens", 0) == 1:  # even one token's share travels in e4m3
                return False
            return a["norm"] == "rms" and a["quant"] == "static" and a["residual"] and not a["gather"]

        step = self._take(NORMS, fits)
        self.norms.add((step.attributes["epsilon"], step.attributes.get("world", 0)))
        others = [name for name in step.inputs[:2] if name != self.x]
        if len(others) != 1 or (self.residual and others != [self.residual]):
            raise Refused(f"{step.name} does not add {self.x} to the residual")
        if len(self.norms) > 1:
            raise Refused(f"{step.name} has another epsilon, or is of other ranks")
        if not self.residual:
            self.start = self.start[0], others[0]
        else:
            self._alone(self.residual)
        self._alone(self.x)
        self.x, self.residual = step.outputs
        return step.inputs[2], step.inputs[4]
