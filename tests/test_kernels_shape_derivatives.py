"""The shape derivatives against 90-digit arithmetic, closed forms, mpmath and differences."""

import numpy as np
import pytest
import scipy.special as sc

from minigrad.kernels import shape_derivatives as sd

# Central differences (relative step 1e-30) of the power series of P and I in 90-digit arithmetic,
# divided by the density. Quantiles reach from 1e-12 to 1 - 1e-12 where float64 can hold them.
GAMMA = np.array(  # a, z, dz/da
    [
        (0.001, 9.82165964406889e-47, 1.0348231948431981e-41),
        (0.01, 5.660738147061307e-201, 2.6069123631716157e-196),
        (0.01, 4.465535018910562e-31, 3.0956367409140126e-27),
        (0.01, 11.339230831322897, 95.33323213668713),
        (0.1, 6.073048362407918e-121, 1.6785005686277825e-117),
        (0.1, 3.5860860184109674e-06, 0.0004344448794682063),
        (0.1, 22.53702647324361, 13.078383532092687),
        (0.7, 6.276272330333042e-18, 3.5701502197684095e-16),
        (0.7, 0.4074237484764413, 0.9298175994807484),
        (0.7, 8.283009943260705, 3.3311225823583626),
        (1.4, 2.2541701716934153e-06, 2.1987245145457222e-05),
        (1.4, 0.6376928475953748, 0.7350644679956936),
        (1.4, 1.0843715114653385, 0.9850338779413785),
        (1.4, 29.11248186790477, 3.512908293660632),
        (3.5, 0.0007515725174813797, 0.0018432175276704582),
        (3.5, 1.416553458907672, 0.6437430607386381),
        (3.5, 4.191715414304193, 1.1462369381611388),
        (3.5, 35.41921412791304, 2.6770403448937192),
        (100, 44.8860220300176, 0.6534526085563893),
        (100, 99.66686491931549, 0.9999980102493883),
        (100, 187.24795536356643, 1.3484245113692512),
        (10000.0, 9312.628969854226, 0.964831827297781),
        (10000.0, 9947.319262019584, 0.9973779482842565),
        (10000.0, 9999.666668642047, 0.9999999998024547),
        (10000.0, 10719.69177661663, 1.0351683622263623),
        (100000.0, 97791.63586923578, 0.9888776366825414),
        (100000.0, 100405.47571024523, 1.002026313959096),
    ]
)
BETA = np.array(  # a, b, z, dz/da, dz/db
    [
        (0.001, 0.001, 1.7450026707432044e-46, 1.0563557186763884e-40, -8.72504199506358e-41),
        (0.01, 0.5, 3.10469797061252e-30, 2.151516525305298e-26, -1.5064771304710224e-29),
        (0.01, 0.5, 0.7811109092304098, 36.606525344305794, -1.2497800244790402),
        (0.5, 0.01, 2.569451278942899e-13, 1.590047951072613e-11, -5.0693165721637206e-11),
        (0.5, 0.01, 0.9999999999999988, 5.925787865249944e-15, -4.3589918451981645e-12),
        (0.3, 0.7, 1.6635847967496953e-40, 5.101796108283295e-38, -3.564551436774876e-40),
        (0.3, 0.7, 0.15877468697850153, 1.1277836563075663, -0.3069138396671073),
        (0.1, 2.1, 3.628297020849251e-121, 1.0027015951724618e-117, -2.1391520572367587e-121),
        (0.1, 2.1, 0.1465512741415488, 1.8686450111999122, -0.07921320010230305),
        (0.1, 2.1, 0.9999921589359602, 4.0952824900377955e-05, -4.545330620424096e-05),
        (1.5, 10, 5.477508674889641e-07, 4.645799617400941e-06, -5.349207188039453e-08),
        (1.5, 10, 0.10907735746077074, 0.08103304852447997, -0.010053637329548042),
        (1.5, 10, 0.9444987746509615, 0.012854811431625115, -0.01583275442839087),
        (2.1, 1.5, 1.4192169461315675e-06, 8.982475462034554e-06, -7.428398795820149e-07),
        (2.1, 1.5, 0.45267164147683586, 0.1576505358300165, -0.17732578385669506),
        (2.1, 1.5, 0.600231279398169, 0.1339984210794864, -0.19967689124330487),
        (2.1, 1.5, 0.9999975894474632, 1.0450968395811434e-06, -2.0093019343489188e-05),
        (10, 100, 0.002805380807886987, 0.0010172240117125285, -2.6828879163928938e-05),
        (10, 100, 0.08843223023126125, 0.008335550331237205, -0.0008088180420302792),
        (10, 100, 0.3825528233649883, 0.010793183261202127, -0.0028609070355627743),
        (0.01, 10000.0, 3.6984487259036405e-27, 1.889563609985924e-23, -3.6986318050959554e-31),
        (0.01, 10000.0, 0.001999960370518229, 0.009873117592144648, -1.998057984392453e-07),
        (10000.0, 0.5, 0.9974609588933724, 2.5358783787155717e-07, -0.0005124740404804893),
        (10000.0, 0.5, 0.9999462903911164, 5.370950918889676e-09, -0.00013881425527009935),
        (10000.0, 3, 0.9986082915108857, 1.390600594774308e-07, -0.0002058661197872587),
        (10000.0, 3, 0.999999608168814, 3.917919327080281e-11, -8.88786887922251e-07),
        (10000.0, 10000.0, 0.4751444094861486, 2.558026148128636e-05, -2.43389877831238e-05),
        (10000.0, 10000.0, 0.5, 2.5000833349999763e-05, -2.5000833349999763e-05),
        (10000.0, 10000.0, 0.5248555905138514, 2.4338987783123796e-05, -2.5580261481286363e-05),
        (3, 100000.0, 1.8171849728234922e-09, 5.978298799164186e-09, -1.8171667996255643e-14),
        (3, 100000.0, 0.0003404623663357068, 2.7934684370985508e-05, -3.4040099865160942e-09),
    ]
)


def _gamma_pdf(a, z):
    return np.exp((a - 1) * np.log(z) - z - sc.gammaln(a))


def _beta_pdf(a, b, z):
    return np.exp((a - 1) * np.log(z) + (b - 1) * np.log1p(-z) - sc.betaln(a, b))


def test_gamma_dz_da_equals_reference_table():
    a, z, dz_da = GAMMA.T
    np.testing.assert_allclose(sd.gamma_dz_da(a, z), dz_da, rtol=2e-12)


def test_beta_dz_equals_reference_table():
    a, b, z, dz_da, dz_db = BETA.T
    np.testing.assert_allclose(sd.beta_dz_da(a, b, z), dz_da, rtol=2e-12)
    np.testing.assert_allclose(sd.beta_dz_db(a, b, z), dz_db, rtol=2e-12)


def test_incomplete_function_derivatives_equal_reference_table():
    a, z, dz_da = GAMMA.T
    np.testing.assert_allclose(sd.gammainc_da(a, z), -_gamma_pdf(a, z) * dz_da, rtol=1e-9)
    a, b, z, dz_da, dz_db = BETA.T
    np.testing.assert_allclose(sd.betainc_da(a, b, z), -_beta_pdf(a, b, z) * dz_da, rtol=1e-9)
    np.testing.assert_allclose(sd.betainc_db(a, b, z), -_beta_pdf(a, b, z) * dz_db, rtol=1e-9)


def test_exponential_shape_derivative_has_closed_form():
    # At a = 1: d/da Gamma(a, z) = e^-z log z + E1(z), hence dz/da = log z + γ + e^z E1(z).
    z = np.geomspace(0.05, 600, 40)
    expected = np.log(z) + np.euler_gamma + np.exp(z) * sc.exp1(z)
    np.testing.assert_allclose(sd.gamma_dz_da(1.0, z), expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [1e-3, 0.1, 1.0, 3.0, 40.0, 1e4])
def test_power_law_beta_has_closed_form(shape):
    # Beta(a, 1) has I = z^a, Beta(1, b) has 1 - I = (1 - z)^b.
    z = np.concatenate([np.geomspace(1e-200, 0.1, 20), np.linspace(0.11, 1 - 1e-9, 21)])
    np.testing.assert_allclose(sd.beta_dz_da(shape, 1.0, z), -z * np.log(z) / shape, rtol=1e-11)
    expected = (1 - z) * np.log1p(-z) / shape
    np.testing.assert_allclose(sd.beta_dz_db(1.0, shape, z), expected, rtol=1e-11)


def test_shape_derivatives_equal_difference_quotients_of_scipy():
    h = 1e-5
    a, x = np.meshgrid([0.3, 1.0, 2.5, 20.0], [0.05, 0.6, 1.0, 3.0, 25.0])
    expected = (sc.gammainc(a + h, x) - sc.gammainc(a - h, x)) / (2 * h)
    np.testing.assert_allclose(sd.gammainc_da(a, x), expected, atol=1e-9)
    a, b, x = np.meshgrid([0.3, 1.0, 2.5, 20.0], [0.4, 1.0, 3.5, 15.0], [0.02, 0.4, 0.5, 0.7, 0.97])
    expected = (sc.betainc(a + h, b, x) - sc.betainc(a - h, b, x)) / (2 * h)
    np.testing.assert_allclose(sd.betainc_da(a, b, x), expected, atol=1e-8)
    expected = (sc.betainc(a, b + h, x) - sc.betainc(a, b - h, x)) / (2 * h)
    np.testing.assert_allclose(sd.betainc_db(a, b, x), expected, atol=1e-8)


def test_shape_derivatives_equal_mpmath_at_random_points():
    mpmath = pytest.importorskip("mpmath", reason="mpmath is not installed")
    rng = np.random.default_rng(0)
    with mpmath.workdps(40):
        for a, b, u in zip(*10 ** rng.uniform(-1, 2, (2, 12)), rng.uniform(0.01, 0.99, 12)):
            z = sc.gammaincinv(a, u)
            slope = mpmath.diff(lambda t, z=z: mpmath.gammainc(t, 0, z, regularized=True), a)
            assert sd.gammainc_da(a, z) == pytest.approx(float(slope), rel=1e-12)
            z = sc.betaincinv(a, b, u)
            slope = mpmath.diff(lambda t, b=b, z=z: mpmath.betainc(t, b, 0, z, regularized=True), a)
            assert sd.betainc_da(a, b, z) == pytest.approx(float(slope), rel=1e-12)


def test_samples_grow_with_a_and_shrink_with_b_in_the_farthest_tails():
    a = np.geomspace(1e-3, 1e5, 9)[:, None]
    slope = sd.gamma_dz_da(a, np.geomspace(1e-300, 1e300, 61))
    assert np.all(slope > 0) and np.all(np.isfinite(slope))
    b, z = (
        a[:, :, None],
        np.concatenate([np.geomspace(1e-290, 0.5, 30), 1 - np.geomspace(0.4, 1e-16, 9)]),
    )
    assert np.all(sd.beta_dz_da(a, b, z) > 0) and np.all(sd.beta_dz_db(a, b, z) < 0)


def test_shape_derivatives_at_the_edges_of_the_support():
    for f, end_limit in ((sd.gammainc_da, 0.0), (sd.gamma_dz_da, np.inf)):
        found = f([2, 2, 2, 2, 0, -1, np.inf, np.nan], [0, np.inf, -1, np.nan, 1, 1, 1, 1])
        np.testing.assert_array_equal(found, [0, end_limit] + 6 * [np.nan])
    for f in (sd.betainc_da, sd.betainc_db, sd.beta_dz_da, sd.beta_dz_db):
        found = f(
            [2, 2, 2, 2, 0, 2, 2], [3, 3, 3, 3, 3, -1, np.inf], [0, 1, -0.1, 1.1, 0.5, 0.5, 0.5]
        )
        np.testing.assert_array_equal(found, [0, 0] + 5 * [np.nan])


def test_shape_derivatives_broadcast_and_compute_in_float64():
    a, z = np.float32([[0.5], [2.0], [30.0]]), np.float32([0.25, 0.5])
    found = sd.gamma_dz_da(a, z)
    assert found.shape == (3, 2) and found.dtype == np.float64
    np.testing.assert_array_equal(found, sd.gamma_dz_da(np.float64(a), np.float64(z)))
    found = sd.betainc_db(a, z[:, None, None], 0.25)
    assert found.shape == (2, 3, 1)
    assert found[1, 2, 0] == sd.betainc_db(30.0, 0.5, 0.25)
    assert np.ndim(sd.beta_dz_da(2.0, 3.0, 0.5)) == 0
    assert sd.gammainc_da(np.ones((0, 3)), 1.0).shape == (0, 3)


def test_shape_derivatives_are_continuous_where_the_method_changes():
    # Series on one side, quadrature on the other; between neighbours the function moves by eps.
    a = np.geomspace(1e-3, 1e5, 65)
    below, above = (sd.gamma_dz_da(a, z) for z in (np.nextafter(1, 0), 1.0))
    np.testing.assert_allclose(below, above, rtol=2e-12)
    a, b = np.geomspace(1e-3, 1e4, 33)[:, None], np.geomspace(1e-3, 2, 17)
    x = 1 / np.geomspace(2.1, 1e4, 33)
    for f in sd.beta_dz_da, sd.beta_dz_db:
        below, above = (f(a, b, z) for z in (0.5, np.nextafter(0.5, 1)))
        np.testing.assert_allclose(below, above, rtol=2e-12)
        below, above = (f(a, t / x, x) for t in (1 - 1e-15, 1 + 1e-15))  # b x = 1
        np.testing.assert_allclose(below, above, rtol=2e-12)
