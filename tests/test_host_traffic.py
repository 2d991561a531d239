"""A server's traffic on a manager alone: the books balance, and in the end nothing is lost.

HOST_OPERATIONS=1000000 in the environment for a long run; ``host_traffic.py`` also says how long each operation takes.
"""

import os

from histories import steps_until
from host_traffic import WHAT, Traffic

OPERATIONS = int(os.environ.get("HOST_OPERATIONS", "8000"))


def test_nothing_leaks_and_nothing_has_two_owners(seed):
    traffic = Traffic(seed, blocks=1000)
    for _ in steps_until(OPERATIONS // 400, traffic.seen.keys(), {*WHAT, "hit", "full"}):
        traffic.run(400)
        traffic.recount()
    print(dict(traffic.seen))
    traffic.close()
