#!/bin/sh
# Compiler launcher: compile_log.sh LOG_DIR COMPILER ARGUMENTS...
# Keeps what the compiler says about NAME.cu (ptxas's resource report, warnings), and the CPU seconds that it took, in
# LOG_DIR/NAME.log.
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
# Of `times`, the second line is about children: user and system time as 1m2.345s. A pipe would ask a subshell.
times > "$log.times"
awk -F'[ms ]+' 'NR == 2 { printf "cpu seconds: %.1f\n", 60 * $1 + $2 + 60 * $3 + $4 }' "$log.times" >> "$log"
rm "$log.times"
if [ $status -ne 0 ]; then cat "$log" >&2; else grep -i warning "$log" >&2; fi
exit $status
