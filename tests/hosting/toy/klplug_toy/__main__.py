"""``python -m klplug_toy``: the toy trainer with its KL replaced."""

from __future__ import annotations

from klplug_toy.hooks import install
from klplug_toy.settings import derive

if __name__ == "__main__":
    install()
    from toyrl import train

    parser = train.parser()
    parser.add_argument("--klplug.kl_type")
    parser.add_argument("--klplug.kl_coef", type=float)
    args = parser.parse_args()
    try:
        derive(args)
    except ValueError as error:
        raise SystemExit(f"klplug: error: {error}") from None
    print(train.train(args).tolist())
