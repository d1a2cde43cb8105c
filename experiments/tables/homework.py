"""Deep generative models of digits: the report of the second homework of CSE 599i (Washington).

Convolutional residual networks, all smaller than the homework's (whose largest has 51 blocks of 128
channels), so that each trains in at most two hours on one core. The Gaussian VAE sees grey values
with pixel scale 0.1 (the homework's 0.03); its likelihood is a density, and cannot be compared with
the others'. All others see Larochelle's binarisation. The flow is eight inverse autoregressive
steps in the encoder. In the last three the logits are a sum of a PixelCNN's and a decoder's: the
first has nothing that keeps the latents in use, the others have free bits, and the last, a
PixelVAE, a flow in its encoder too. Rate: the mean KL term, in nats; active units: how many of the
20 latents have a mean that varies over images, by more than 0.01 in variance; both of 1,000 random
test images.

ELBO, and log-likelihood by 1,000 importance samples (exact for the PixelCNN), in nats per test
image, with the standard error over images: all 10,000 for the PixelCNN and for the ELBO of the
Gaussian VAE, 200 random ones for its likelihood and for the autoregressive decoders, 1,000 for the
discrete VAE and its flow. Most of an error of 1.3 is the choice of 200 images, the same for all
three.
"""

from experiments.tables import Cell, Table
from experiments.tables.plots import draw_table


def flow_cell(row, kind):
    """One of the two models of the run `flow_vae`."""
    return Cell(
        row,
        "ours",
        "flow_vae",
        "binarized_mnist",
        {},
        {"ELBO": f"elbo_1000_{kind}_0", "log-likelihood": f"bound_1000_{kind}_0"},
        {"ELBO": "-87.41"} if kind == "plain" else {},
        "b" if kind == "plain" else "",
    )


def decoder_cell(row, cure, published=None):
    """An autoencoder whose decoder sees pixels."""
    return Cell(
        row,
        "ours",
        "pixelvae",
        "binarized_mnist",
        {"cure": cure},
        {"ELBO": "elbo", "log-likelihood": "log_evidence", "rate": "rate"}
        | {"active units": "active_units"},
        {"ELBO": published} if published else {},
        "b" if published else "",
    )


TABLE = Table(
    "The models of the homework report",
    "Published, for models of the same kind and the fixed binarisation: table 1 of Gulrajani et "
    "al. (2017), read in the paper. The homework's text states no numbers; its notebook "
    "ends with a bare 80.5.",
    [
        Cell(
            f"Gaussian VAE, {label}",
            "ours",
            "conv_gaussian",
            "mnist",
            {},
            {"ELBO": f"{kind}_elbo", "log-likelihood": f"{kind}_bound_1000"},
            {},
            "a",
        )
        for kind, label in {"closed": "KL in closed form", "sampled": "KL by samples"}.items()
    ]
    + [
        Cell(
            "PixelCNN",
            "ours",
            "pixelcnn",
            "binarized_mnist",
            {},
            {"log-likelihood": "test_log_likelihood"},
            {"log-likelihood": "-81.30"},
        ),
        flow_cell("discrete VAE", "plain"),
        flow_cell("discrete VAE, flow in the encoder", "flow"),
        decoder_cell("autoregressive decoder", "none"),
        decoder_cell("autoregressive decoder, free bits", "free-bits"),
        decoder_cell("PixelVAE, flow and free bits", "flow-free-bits", "-80.64"),
    ],
    {
        "a": "A density of grey values: positive, and of its own scale.",
        "b": "Published: PixelVAE's is a larger model; the size of the other is not known to us.",
    },
)


def figure_table_homework():
    """The models of the homework report: bounds and likelihoods, ours and published."""
    return draw_table("homework")
