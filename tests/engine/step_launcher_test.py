"""In which order one step's programs are launched."""

from types import SimpleNamespace

from infinite_llm.engine.programs import StepOutput
from infinite_llm.engine.step_launcher import StepLauncher
from infinite_llm.scheduler.step_plan import Row, StepPlan


def test_what_takes_long_is_launched_last():
  """Else other processes would wait for it in group programs."""
  launched = []
  output = StepOutput(logits=None, proved=None)

  def noting(name, result):
    return lambda *args, **options: launched.append(name) or result

  sampler = SimpleNamespace(sample=lambda output, rows: None, newest=None)
  launcher = StepLauncher(
    runner=SimpleNamespace(
      instances=range(2),
      local_step=lambda instance, rows, is_prefill, newest: (
        launched.append(f"{'prefill' if is_prefill else 'decode'} {instance}")
        or output
      ),
      group_step=noting("group", [output] * 2),
    ),
    group=SimpleNamespace(
      install_tables=noting("tables", None),
      slots=lambda rows: [],
      managers=[SimpleNamespace(table=lambda uid: None)] * 2,
    ),
    samplers=[sampler] * 2,
    clock=lambda: 0.0,
    layered=SimpleNamespace(step=noting("layered", output)),
  )
  rows = [
    (Row(uid=uid, start=8, num_tokens=1, samples=True),) for uid in range(5)
  ]
  plans = [
    StepPlan(local_decode=rows[0], layered=rows[1]),
    StepPlan(local_decode=rows[2], group_decode=rows[3], local_prefill=rows[4]),
  ]
  request = SimpleNamespace(tokens=lambda start, end: [5], num_tokens=9)

  flights = launcher.launch(plans, None, lambda uid: request)

  assert launched == [
    "tables",
    "decode 0",
    "decode 1",
    "group",
    "prefill 1",
    "layered",
  ]
  assert [
    (flight.is_group, [row.uid for step in flight.steps for row in step.rows])
    for flight in flights
  ] == [(True, [3, 2]), (False, [0, 1]), (False, [4])]
