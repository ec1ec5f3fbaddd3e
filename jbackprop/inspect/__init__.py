"""A network on some examples, as a page that one looks at instead of reading.

`inspect` makes the page. `measure` gives its figures, and `facts` what they say, in words.
"""

from jbackprop.inspect.facts import Fact as Fact
from jbackprop.inspect.facts import facts as facts
from jbackprop.inspect.figures import Inspection as Inspection
from jbackprop.inspect.figures import LayerFigures as LayerFigures
from jbackprop.inspect.figures import measure as measure
from jbackprop.inspect.page import inspect as inspect
from jbackprop.inspect.spread import Spread as Spread
