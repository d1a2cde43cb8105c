"""VQ-VAE on digits: reconstruction, use of the codebook, and a learned prior over the codes.

The run `vq_vae` of chapter 13: a strided convolution and residual blocks, codes that follow moving
averages and are revived when they die, beta = 0.25, Bernoulli pixels; then a PixelCNN as prior over
the grid of codes. `small` is 8 x 8 digits, 4 x 4 grids of 16 codes, bits drawn anew for every
batch; `MNIST` is Larochelle's binarisation, 7 x 7 grids of 128 codes.

Distortion is minus the log-likelihood of a test image given its codes. The three priors are what
the codes of an image cost by each: uniform over the codebook, the frequencies of the codes, and
the PixelCNN. The bound is the likelihood with the last of them. All in nats per test image, all
test images. Perplexity: the exponential of the entropy of the codes' frequencies, at most the size
of the codebook. Squared error is that of the pixel means, as a share of the pixels' variance.
"""

from experiments.tables import Cell, Table
from experiments.tables.plots import draw_curves, draw_table


def share_of_variance(record):
    """What is shown: squared error of the reconstruction over the variance of the pixels."""
    scalars = record["scalars"]
    return scalars["test_squared_error"] / scalars["test_pixel_variance"], None


VALUES = {
    "distortion": "test_distortion",
    "squared error": share_of_variance,
    "perplexity": "test_perplexity",
    "prior: uniform": "uniform_nats",
    "prior: frequencies": "frequency_nats",
    "prior: PixelCNN": "test_prior_nats",
    "bound": "test_bound",
}

TABLE = Table(
    "VQ-VAE on digits",
    "No comparable number is published: the paper has none on MNIST, and public programs use other "
    "likelihoods.",
    [
        Cell("small", "ours", "vq_vae", "digits", {}, VALUES),
        Cell("MNIST", "ours", "vq_vae", "binarized_mnist", {}, VALUES),
    ],
    {},
    {"distortion": "test_distortion", "nats of the codes": "test_prior_nats"},
)


def figure_table_vq():
    """VQ-VAE on digits: distortion, use of the codebook, and the codes' cost by three priors."""
    return draw_table("vq")


def figure_curves_vq():
    """Distortion, and nats of the codes by the PixelCNN, during the two trainings of each VQ-VAE.

    First encoder, decoder and codebook are trained, then the prior.
    """
    return draw_curves("vq")
