"""``python -m traj_merge_callback``: the ``traj-merge`` command."""

from .offline.cli import app

if __name__ == "__main__":
    app(prog_name="traj-merge")
