"""`python -m simulations`: run one world, or a swarm of them."""

from __future__ import annotations

from simulations.cli import app

if __name__ == "__main__":
    app(prog_name="python -m simulations")
