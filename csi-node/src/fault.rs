//! Points at which a test can end the process as SIGKILL does: between two steps of which each may be the last.
//!
//! Only in builds with debug assertions, as those that tests are made with. A release has nothing of it.

/// Every point, in the order of the story. A test goes through all of them, so one that is not reached is noticed.
#[cfg(debug_assertions)]
pub const POINTS: &[&str] = &[
    "fetch.restored",
    "register.locked",
    "register.noted",
    "register.moved",
    "register.committed",
    "publish.fetched",
    "view.rooted",
    "view.linked",
    "view.filled",
    "view.placed",
    "publish.found",
    "publish.recorded",
    "publish.target-made",
    "publish.mounted",
    "memory.attached",
    "memory.shown",
    "sync.synced",
    "sync.marked",
    "unpublish.unmounted",
    "unpublish.forgotten",
    "trash.begun",
    "collect.view-gone",
    "collect.rows-gone",
    "collect.files-gone",
    "repair.retired",
    "repair.exchanged",
];

/// The variable that names the point at which the process is to end.
#[cfg(debug_assertions)]
pub const VARIABLE: &str = "NIX_CSI_KILLED_AT";

/// Ends the process here if that was asked for.
#[cfg(debug_assertions)]
pub(crate) fn point(name: &'static str) {
    use std::sync::LazyLock;
    static AT: LazyLock<Option<String>> = LazyLock::new(|| std::env::var(VARIABLE).ok());
    debug_assert!(POINTS.contains(&name), "{name} is not in the list of points");
    if AT.as_deref() == Some(name) {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// Nothing.
#[cfg(not(debug_assertions))]
pub(crate) fn point(_: &'static str) {}
