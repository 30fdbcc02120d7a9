"""More of optimizer, schedule, state and processes."""

from fault import CODE, RESTORE, Fault, Place, Stage, Truth, exclude, marked, put
from sources import model, schedule
from voices import FIRST, spoil

from catalog.shared import FORWARD, PLAIN, RANKS, SGD, STOPPED, WAV, edit_last

RESTARTS = schedule(
    "Inverse square root with warm restarts.",
    ", restart_steps=6",
    """
    since = torch.tensor(float((step + 1) % restart_steps))
    return (1.0 / since.sqrt()).item()  #!
    """,
)
STANDARDISE = model(
    start="""
    spread, mean = torch.std_mean(
        x,
        dim=1,
        keepdim=True,
    )
    x = (x - mean).div(spread)  #!
    """,
)


def negative_moment(state):
    """A second moment below 0, as a difference of two checkpoints can give."""
    state["optimizer_state_dict"]["state"][0]["exp_avg_sq"].view(-1)[7] = -0.5


WEIGHT = "__S__.conv.weight"
MOMENT = (WEIGHT, "optimizer.0.exp_avg_sq", f"{WEIGHT}.exp_avg_sq", f"exp_avg_sq.{WEIGHT}")

FAULTS = (
    Fault(
        id="N37",
        title="inverse root of the steps since a restart, which are 0",
        settings={"scheduler": "unseen", "nan_patience": 4},
        plugins={"scheduler/unseen.py": RESTARTS},
        truths=(
            Truth(
                ("state_nonfinite",),
                ("optimizer",),
                (marked(), Place(keys=("lr", "scheduler", "restart_steps"))),
                (
                    CODE,
                    put("scheduler", lambda v: v != "unseen"),
                    put("restart_steps", lambda v: v > 17),
                ),
            ),
        ),
        status=3,
    ),
    Fault(
        id="N38",
        title="momentum 99, a point was left out",
        settings={**SGD, "model": "Plain", "lr": 0.01, "momentum": 99.0},
        plugins={"models/Plain.py": PLAIN},
        truths=(
            Truth(
                STOPPED,
                ("optimizer",),
                (Place(keys=("momentum",)),),
                (put("momentum", lambda v: 0 <= v < 1),),
            ),
        ),
        status=3,
    ),
    Fault(
        id="N39",
        title="resume with a second moment of Adam below 0",
        settings={"max_epoch": 1, "nan_patience": 4},
        more=(Stage(edit_last(negative_moment), {"max_epoch": 3}, 3),),
        truths=(
            Truth(
                ("state_nonfinite",),
                ("state", "optimizer"),
                (Place(parameters=MOMENT),),
                (RESTORE,),
            ),
        ),
    ),
    Fault(
        id="N40",
        title="a constant file over its deviation, on one of two ranks",
        settings={"model": "unseen", **RANKS, "nan_patience": 1000},
        plugins={"models/unseen.py": STANDARDISE},
        prepare=spoil(FIRST, lambda samples: samples * 0.0 - 0.125),
        processes=2,
        truths=(
            Truth(
                FORWARD,
                ("model_forward", "distributed", "input", "frontend"),
                (Place(code=True, named_rank=True), Place(files=(WAV,), named_rank=True)),
                (CODE, exclude(WAV)),
            ),
        ),
    ),
)
