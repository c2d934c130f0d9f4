"""Where features meet the planner: what not every plan needs, a file each.

weight_gradients  gradients that go elsewhere           fields of Request; the lines of a step
casting           autocast and residual streams         ops that are added before planning
optimal, measured other planners                        functions in the place of `greedy`
alive, ordered    a backward for few rows               the lines of a step, the plan
quantized         quantized values, and their weights   definitions of variables
check             OPSGRAPH_CHECK                        the lines of a step
verify, show      what is wrong with a plan; its text   the plan when it is made
"""

from functools import partial

from ..base.config import Config
from ..fusers.quantizing import prepare_by
from ..plan import Plan, make_plan
from ..plan.basic_ops import BasicOps
from ..plan.planner import Planner
from ..plan.program import Request
from .alive import Noted
from .casting import in_their_dtypes, with_casts
from .check import checked
from .measured import PLANNERS
from .ordered import with_few
from .quantized import QuantizedDefinitions
from .show import logged
from .verify import verified
from .weight_gradients import of_what_runs, send_elsewhere, with_elsewhere, with_places


def planned(
    run: BasicOps, request: Request, order: tuple[str, ...], planner: str | Planner, config: Config
) -> Plan:
    """The plan of a run for one kind of call, as `make_plan`, with all features.

    order: backends, the preferred one first. planner: a name, or what chooses the steps.
    """
    noted = Noted()
    after = send_elsewhere, in_their_dtypes, (checked if config.check else noted)
    definitions = partial(QuantizedDefinitions, partial(prepare_by, order), after)
    planner = PLANNERS[planner] if isinstance(planner, str) else planner
    request = of_what_runs(run, request)
    run, request = with_casts(run, with_elsewhere(run, request))
    plan = make_plan(run, request, order, planner, config.fuel, definitions)
    plan = with_few(with_places(plan, request), noted)
    noted.forget()
    return logged(verified(plan, config.check), config)
