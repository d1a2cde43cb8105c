"""One look per estimator and model for the whole book, told apart by colour-blind readers too."""

__all__ = ["COLOUR", "LINESTYLE", "MARKER", "rounding"]

# name: colour, line style, marker. What is drawn together differs in colour (tests/test_figures.py
# holds the list and simulates two kinds of colour blindness); the other two are a second cue.
_LOOK = {
    # truths and numerical references
    "exact": ("#222222", "-", "x"),
    "numeric": ("#9c9ca1", ":", "+"),
    # estimators of gradients of expectations
    "score_function": ("#bd1f01", "-", "o"),
    "pathwise": ("#3f90da", "-", "s"),
    "implicit": ("#7a21dd", "--", "D"),
    "sticking_the_landing": ("#717581", "--", "v"),
    "baseline": ("#bb5566", "--", "^"),
    "leave_one_out": ("#b9ac70", "-", "v"),
    "nvil": ("#ddaa33", "-", "P"),
    "muprop": ("#aa4499", "--", "*"),
    "vimco": ("#33bbee", "--", "D"),
    "dreg": ("#999933", "--", "<"),
    "concrete": ("#a96b59", "-", "D"),
    "straight_through": ("#5790fc", "--", ">"),
    "gumbel_rao": ("#0000cc", ":", "<"),
    "lax": ("#964a8b", ":", "s"),
    "rebar": ("#33bbee", "-", "^"),
    "relax": ("#832db6", "-", "o"),
    "arm": ("#964a8b", "--", "h"),
    "disarm": ("#9c9ca1", "-", "p"),
    "double_control_variate": ("#f89c20", "--", "X"),
    # models and families of posteriors
    "autoencoder": ("#ee7733", "--", "o"),
    "vae": ("#0072b2", "-", "s"),
    "iwae": ("#7a21dd", "-", "^"),
    "vq_vae": ("#009988", "-", "D"),
    "mean_field": ("#332288", "--", "s"),
    "semi_implicit": ("#f89c20", "-", "o"),
}
COLOUR = {name: look[0] for name, look in _LOOK.items()}
LINESTYLE = {name: look[1] for name, look in _LOOK.items()}
MARKER = {name: look[2] for name, look in _LOOK.items()}


def rounding(artist):
    """Mark a drawn artist whose numbers are round-off itself, and return it.

    Such numbers differ from machine to machine; `python -m figures --check` then compares how many
    there are and the size of the largest, to a factor of 100, instead of each.
    """
    artist.is_rounding = True
    return artist
