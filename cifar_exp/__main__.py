from cifar_exp.system.import_path import use_safe_path

use_safe_path()  # before anything else is imported

from cifar_exp.cli.entry import main  # noqa: E402

main()
