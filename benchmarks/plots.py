"""The figures of the reference run, `benchmarks/reference.json`, drawn by `python -m figures`."""

import json
from pathlib import Path

import numpy as np

from chapters.style import COLOUR, MARKER

REFERENCE = Path(__file__).parent / "reference.json"
LABEL = {  # what is drawn, from the top
    "vae_step": "VAE, training step",
    "reinforce_step": "REINFORCE, training step",
    "relax_step": "RELAX, training step",
    "pixelcnn_step": "PixelCNN, training step",
    "pixelcnn_sample": "PixelCNN, sampling",
    "conv2d": "convolution, four shapes",
    "conv2d_1_to_32_28_3x3": "… 1 to 32 channels, 3×3",
    "conv2d_32_to_64_14_3x3_stride2": "… 32 to 64 channels, 3×3, stride 2",
    "conv2d_64_to_64_28_3x3": "… 64 to 64 channels, 3×3",
    "conv2d_32_to_32_28_7x7": "… 32 to 32 channels, 7×7",
    "bernoulli": "Bernoulli draws",
    "gumbel_max": "Gumbel-max draws",
    "nearest_code": "nearest code",
    "small_op": "small op, 8 floats",
    "small_op_chain": "chain of 100 small ops, per op",
    "untraced_call": "call without tracing, 8 floats",
    "alternating": "convolution and GEMM, in turn / alone",
    "conv2d_memory": "memory: convolutions",
    "vae_memory": "memory: VAE",
}


def _reference():
    return json.loads(REFERENCE.read_text(encoding="utf-8"))


def figure_benchmarks():
    """Cost in minigrad over that in the fastest other framework; left of 1 it is less.

    Case by case, with the ratios that were aimed at.
    """
    import matplotlib.pyplot as plt

    entries = {entry["case"]: entry for entry in _reference()["cases"]}
    shown = [name for name in LABEL if name in entries]
    fig, ax = plt.subplots(figsize=(6.4, 4.6))
    ax.axvline(1, color=COLOUR["numeric"], linewidth=1)
    kinds = {
        "ratio": ("fastest eager framework, or NumPy by hand", "pathwise", 0.14),
        "jax_ratio": ("JAX, compiled", "score_function", -0.14),
    }
    for key, (label, look, above) in kinds.items():
        for what, marker, filled in ((key, MARKER[look], True), (None, "|", False)):
            field = what or key.replace("ratio", "target")
            at = [i for i, name in enumerate(shown) if entries[name][field] is not None]
            values = [entries[shown[i]][field] for i in at]
            text = label if filled else ("aimed at, in the same colour" if key == "ratio" else None)
            size = 5 if filled else 9
            style = {"color": COLOUR[look], "linestyle": "none", "markersize": size, "label": text}
            ax.plot(values, [above - i for i in at], marker, **style)
    ax.set_yticks(-np.arange(len(shown)), [LABEL[name] for name in shown])
    ax.tick_params(axis="y", length=0)
    ax.set(xscale="log", xlabel="cost in minigrad / cost there")
    ticks = [0.001, 0.01, 0.1, 0.5, 1, 2, 10]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    fig.legend(loc="outside lower center", ncols=3)  # inside, its marks look like data
    return fig


def figure_scaling():
    """Time and memory of a step against one size at a time; the dotted lines are proportional."""
    import matplotlib.pyplot as plt

    sweeps = _reference()["scaling"]
    fig, panels = plt.subplots(2, len(sweeps), figsize=(6.4, 3.8), sharex="col")
    for column, sweep in zip(panels.T, sweeps):
        sizes = np.array(sweep["sizes"])
        for ax, key, slope in zip(column, ("ms", "MiB"), ("time_slope", "memory_slope")):
            costs = np.array(sweep[key])
            ax.loglog(sizes, costs[-1] * sizes / sizes[-1], ":", color=COLOUR["numeric"])
            ax.loglog(sizes, costs, MARKER["pathwise"], color=COLOUR["pathwise"], markersize=3)
            ax.text(0.06, 0.88, f"slope {sweep[slope]:.2f}", transform=ax.transAxes, fontsize=8)
        column[0].set_title(sweep["against"])
        column[1].set_xlabel(sweep["against"])
    panels[0, 0].set_ylabel("time (ms)")
    panels[1, 0].set_ylabel("memory (MiB)")
    return fig
