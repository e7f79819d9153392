"""The network half: peers, discovery, the wire, the planner, the bulk plane and origins."""

from __future__ import annotations

import logging

# A library is silent unless its user asks for logs.
logging.getLogger("tensorswarm").addHandler(logging.NullHandler())
