"""lzy makes a running Python interpreter movable: dump it, let it go, bring it back in a blink.

The words of the field as lzy uses them are defined in `lzy.checkpoint`.
"""
