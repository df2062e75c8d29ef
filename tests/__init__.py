from tests.helpers.bytecode import keep_bytecode

keep_bytecode()  # before anything heavy is imported
