"""Stand-in."""
from math import gcd
def head_split(heads, kv_heads, ranks):
    group = heads // kv_heads
    out = []
    first = 0
    for r in range(ranks):
        n = heads // ranks + (r < heads % ranks)
        g = gcd(gcd(group, first), n)
        out.append((first, n, [(first + i * g) // group for i in range(n // g)]))
        first += n
    return out
