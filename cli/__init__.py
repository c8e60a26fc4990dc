"""The commands that people type: `lzy dump`, `lzy restore` and their kin."""
