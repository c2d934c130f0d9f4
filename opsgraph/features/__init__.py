"""What not every call or plan needs: each feature is one file, and one hook in what it serves.

Those of plans are listed in `planned`. Those of calls, each with its hook:

    recipes     quantized weights and scales         Stage.recipe
    unseen      gradients past autograd              Stage.unseen, where Stage.eager_only is set
    followed    torch.func, forward-mode AD, traces  Stage.run_followed
    compiled    torch.compile                        Stage.run_compiled, Sequential._run_compiled
    dtensor     parameters that are DTensors         own_part, in Parameters.weights
    op_kwargs   the caller's buffers                 run_with, in Sequential.forward
    inputs      what no stage could take             explain, in Sequential.forward
    called      ops with hooks                       spread, in Sequential._entries
    examples    plans without a call                 Stage.plan, Sequential.plan
    listed      the list protocol of nn.Sequential   a base of Sequential
    planned     what not every plan needs            Stage._make
    dimensions  inputs that are not [rows, width]    flattened, in eager; as_given, in the backward
    containers  lists that ops hold                  watch, in Sequential._prepare
    convert     torch.nn and back                    a base of Sequential
"""

from . import declared_fusers as declared_fusers
from . import derived as derived
