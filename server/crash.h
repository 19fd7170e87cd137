/* crash.h: the last words of a process that crashes: the signal, what the engine was at, a backtrace; and of one whose weights file
 * was cut short. Called by main.c once, before there are other threads.
 */
#ifndef GPTD_SERVER_CRASH_H
#define GPTD_SERVER_CRASH_H

#include <stdbool.h>

// json: the first line is JSON, as the log's are. A fault within a weights file ends the process with status file_cut, any other
// with the signal.
void crash_init(bool json, int file_cut);

#endif
