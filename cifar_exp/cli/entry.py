"""The ways in: a command that cannot run here is refused in one line, before anything heavy is imported.

Older versions of Python must be able to read this module, too, or they would show a traceback in place of that line.
"""

import importlib
import sys

from cifar_exp.system.interpreter import refuse_others


class Command:
    """One command, which its script calls without arguments."""

    def __init__(self, program: str, module: str) -> None:
        self.program, self.module = program, module

    def __call__(self) -> "int | None":
        """Run it and return its exit code; an error that it has not told is told here."""
        refuse_others(self.program)
        try:
            code: int | None = importlib.import_module(self.module).main()
            return code
        except Exception as error:
            from cifar_exp.system.bugs import told

            problem = told(error)
            print(f"{self.program}: {problem}", file=sys.stderr)
            return problem.exit_code


train = Command("cifar-exp", "cifar_exp.cli.main")
data = Command("cifar-exp-data", "cifar_exp.cli.data")
predict = Command("cifar-exp-predict", "cifar_exp.cli.predict")
report = Command("cifar-exp-report", "cifar_exp.cli.report")
sync = Command("cifar-exp-sync", "cifar_exp.cli.sync")
ui = Command("cifar-exp-ui", "cifar_exp.cli.ui")
verify = Command("cifar-exp-verify", "cifar_exp.cli.verify")
