"""The same work on minigrad, on its peers and in NumPy by hand, timed side by side.

`python -m benchmarks` runs all cases. A case is a module of this package: one function per
framework, called in a process of that framework alone, sets the work up and returns

    step()     what is timed, once, and
    result()   a dict of arrays by which the frameworks are held to agree before anything is timed.

Called with a number, it takes that many rows of data, so that tests are quick.

The functions of one case must do the same work on the same numbers, each as its framework does it
best (`peers.fastest` tries several forms). What is compared are ratios within one run: see
`harness`.
"""
