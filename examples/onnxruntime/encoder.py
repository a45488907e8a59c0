"""Attention of varlen-fa between the nodes of an ONNX model, on onnxruntime's own buffers, on the CPU.

The model, a small encoder, is cut at each attention: one session up to q, k and v, one for what is
behind it. onnxruntime allocates their tensors; the C library reads q, k and v where they lie and
writes into the buffer that the next session is bound to. Nothing is copied. The whole model with
onnxruntime's own attention, MultiHeadAttention with a key padding mask, runs beside it: the outputs
are compared, and both are timed.

    pip install onnx onnxruntime
    cargo build --release -p varlen-fa-capi
    python examples/onnxruntime/encoder.py
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, checker, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "capi/python"))
import varlen_fa

LAYERS, HEADS, DIM = 3, 12, 32
WIDTH = HEADS * DIM
# Sentences of a batch: tokens of each.
LENGTHS = [128, 16, 90, 24, 60, 33, 110, 12, 70, 44, 20, 101, 66, 30, 80, 52]
SEQ = max(LENGTHS)
TOLERANCE = 1e-4


def weights():
    """q, k, v and output projections of each layer."""
    rng = np.random.default_rng(26318)
    scale = WIDTH**-0.5
    return [{name: rng.normal(0, scale, (WIDTH, WIDTH)).astype(np.float32) for name in "qkvo"} for _ in range(LAYERS)]


def projections(layer, x):
    """Nodes from the hidden states `x` to the layer's q, k and v, [B, S, width]."""
    return [helper.make_node("MatMul", [x, f"{part}{layer}"], [f"{part}{layer}_out"]) for part in "qkv"]


def behind(layer, attended, x, out):
    """Nodes from the layer's attention to its output: a projection, the residual, a norm."""
    return [
        helper.make_node("MatMul", [attended, f"o{layer}"], [f"projected{layer}"]),
        helper.make_node("Add", [f"projected{layer}", x], [f"sum{layer}"]),
        helper.make_node("LayerNormalization", [f"sum{layer}", "ones"], [out], axis=-1),
    ]


def session(nodes, inputs, outputs, values):
    """A session of these nodes; `inputs` and `outputs` are float tensors [B, S, width] unless they say more."""

    def info(name):
        if name == "mask":
            return helper.make_tensor_value_info(name, TensorProto.INT32, ["B", "S"])
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "S", WIDTH])

    used = {name for node in nodes for name in node.input}
    constants = [numpy_helper.from_array(value, name) for name, value in values.items() if name in used]
    graph = helper.make_graph(nodes, "encoder", [*map(info, inputs)], [*map(info, outputs)], constants)
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=8)
    checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Else its threads spin between the nodes of a model, and take the cores from whoever computes there.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def whole_model(values):
    """The model with onnxruntime's own attention."""
    nodes = []
    for layer in range(LAYERS):
        inputs = [f"{part}{layer}_out" for part in "qkv"]
        nodes += projections(layer, f"x{layer}")
        nodes.append(
            helper.make_node(
                "MultiHeadAttention", [*inputs, "", "mask"], [f"a{layer}"], domain="com.microsoft", num_heads=HEADS
            )
        )
        nodes += behind(layer, f"a{layer}", f"x{layer}", f"x{layer + 1}")
    return session(nodes, ["x0", "mask"], [f"x{LAYERS}"], values)


def pieces(values):
    """The model in sessions: before, between and behind the attentions."""
    parts = []
    for layer in range(LAYERS + 1):
        nodes, inputs, outputs = [], [f"x{layer}"], [f"x{layer}"]
        if layer > 0:
            nodes += behind(layer - 1, f"a{layer - 1}", f"x{layer - 1}", f"x{layer}")
            inputs = [f"a{layer - 1}", f"x{layer - 1}"]
        if layer < LAYERS:
            nodes += projections(layer, f"x{layer}")
            # The hidden states too: the residual behind the attention needs them.
            outputs = [f"{part}{layer}_out" for part in "qkv"] + ([f"x{layer}"] if layer > 0 else [])
        parts.append((session(nodes, inputs, outputs, values), inputs, outputs))
    return parts


class Encoder:
    """The pieces over buffers that are allocated once, for batches of one shape."""

    def __init__(self, values, batch, seq):
        library = varlen_fa.Library()
        self.library, self.device = library, library.open_cpu()
        shape = (batch, seq, WIDTH)
        names = [name for layer in range(LAYERS + 1) for name in (f"x{layer}", f"a{layer}")]
        names += [f"{part}{layer}_out" for layer in range(LAYERS) for part in "qkv"]
        # onnxruntime's memory, by its CPU allocator.
        self.buffers = {
            name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cpu") for name in names
        }
        self.bound = []
        for part, inputs, outputs in pieces(values):
            binding = part.io_binding()
            for name in inputs:
                binding.bind_ortvalue_input(name, self.buffers[name])
            for name in outputs:
                binding.bind_ortvalue_output(name, self.buffers[name])
            self.bound.append((part, binding))
        by_head = (batch, seq, HEADS, DIM)
        self.views = [
            [self.view(name, by_head) for name in (f"q{layer}_out", f"k{layer}_out", f"v{layer}_out", f"a{layer}")]
            for layer in range(LAYERS)
        ]

    def view(self, name, shape):
        """[B, S, width] as it lies is [B, S, H, D]."""
        address = self.buffers[name].data_ptr()
        return varlen_fa.tensor(address, shape, varlen_fa.row_major(shape), varlen_fa.F32)

    def run(self, x, lengths):
        self.buffers["x0"].update_inplace(x)
        # Once per request; every layer uses it.
        with self.library.meta_from_lengths(lengths, seq=x.shape[1]) as meta:
            mask = varlen_fa.varlen(meta)
            for (part, binding), tensors in zip(self.bound, [*self.views, None]):
                part.run_with_iobinding(binding)
                if tensors:
                    self.device.forward(*tensors, mask)
        return self.buffers[f"x{LAYERS}"].numpy()


def fastest(call, rounds):
    """Milliseconds by the clock, and of all threads together."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter(), time.process_time()
        call()
        times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return [1e3 * min(column) for column in zip(*times)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="the fastest of so many runs counts")
    rounds = parser.parse_args().rounds
    values = {f"{part}{at}": w for at, layer in enumerate(weights()) for part, w in layer.items()}
    values["ones"] = np.ones(WIDTH, np.float32)
    x = np.random.default_rng(1).normal(size=(len(LENGTHS), SEQ, WIDTH)).astype(np.float32)
    kept = np.arange(SEQ) < np.array(LENGTHS)[:, None]

    whole, encoder = whole_model(values), Encoder(values, len(LENGTHS), SEQ)
    feeds = {"x0": x, "mask": kept.astype(np.int32)}
    expected, found = whole.run(None, feeds)[0], encoder.run(x, LENGTHS)
    worst = np.abs(found - expected)[kept].max()
    attended = encoder.buffers["a0"].numpy()
    zeros = not attended[~kept].any()
    print(f"onnxruntime {onnxruntime.__version__}, varlen-fa {encoder.library.version}, {kept.mean():.0%} of the tokens valid")
    print(f"largest difference in valid rows {worst:.1e}; masked rows of the attention are zero: {'yes' if zeros else 'no'}")
    if not (worst <= TOLERANCE and zeros):
        sys.exit("the outputs differ")
    theirs = fastest(lambda: whole.run(None, feeds), rounds)
    ours = fastest(lambda: encoder.run(x, LENGTHS), rounds)
    for clock, their_ms, our_ms in zip(("by the clock", "of all threads"), theirs, ours):
        ratio = their_ms / our_ms
        print(f"{LAYERS} layers, ms {clock:<14}  onnxruntime's attention {their_ms:7.1f}  varlen-fa's {our_ms:7.1f}  {ratio:.2f}x")


if __name__ == "__main__":
    main()
