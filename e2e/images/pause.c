/* The first process of a pod's sandbox: holds the namespaces, reaps orphans
 * (a pod may share its process namespace), and ends when asked to. */
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void reap(int signal) {
    (void)signal;
    while (waitpid(-1, 0, WNOHANG) > 0)
        ;
}

static void leave(int signal) {
    (void)signal;
    _exit(0);
}

int main(void) {
    struct sigaction on_child = {.sa_handler = reap, .sa_flags = SA_NOCLDSTOP};
    struct sigaction on_end = {.sa_handler = leave};
    if (sigaction(SIGCHLD, &on_child, 0) || sigaction(SIGTERM, &on_end, 0) || sigaction(SIGINT, &on_end, 0))
        return 1;
    for (;;)
        pause();
}
