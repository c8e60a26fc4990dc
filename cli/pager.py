"""`lzy pager`: taking over from a pager that died, and seeing who still gets memory."""

from __future__ import annotations
