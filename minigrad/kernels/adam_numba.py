"""The compiled loop of `adam.py`."""

import numpy as np

from minigrad.kernels.compiled import njit


@njit
def adam(p, g, m, v, p_new, m_new, v_new, b1, a1, b2, a2, rate, eps):
    """All arrays flat and of one dtype, which the scalars have too; a1 = 1 - b1, a2 = 1 - b2."""
    for i in range(p.size):
        m_new[i] = b1 * m[i] + a1 * g[i]
        v_new[i] = b2 * v[i] + a2 * (g[i] * g[i])
        p_new[i] = p[i] - rate * (m_new[i] / (np.sqrt(v_new[i]) + eps))
