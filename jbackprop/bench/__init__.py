"""Manual against automatic gradients: a suite of workloads, in which everybody takes turns.

`python -m jbackprop bench` runs it. What is measured is data: a `Workload` and its `Contestant`s.
"""

from jbackprop.bench.comparison import compare as compare
from jbackprop.bench.contest import Row as Row
from jbackprop.bench.contest import measure as measure
from jbackprop.bench.declare import Absent as Absent
from jbackprop.bench.declare import Contestant as Contestant
from jbackprop.bench.declare import Outside as Outside
from jbackprop.bench.declare import Workload as Workload
from jbackprop.bench.declare import peer as peer
from jbackprop.bench.report import page as page
from jbackprop.bench.report import timetable as timetable
from jbackprop.bench.results import Run as Run
