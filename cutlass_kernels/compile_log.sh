#!/bin/sh
# Compiler launcher: compile_log.sh LOG_DIR COMPILER ARGUMENTS...
# Keeps what the compiler says about NAME.cu (ptxas's resource report, warnings) in LOG_DIR/NAME.log.
log_dir=$1
shift
previous=
for argument in "$@"; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
name=${object##*/}
log=$log_dir/${name%.cu.o}.log

"$@" > "$log" 2>&1
status=$?
if [ $status -ne 0 ]; then cat "$log" >&2; else grep -i warning "$log" >&2; fi
exit $status
