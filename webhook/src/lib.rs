//! The admission webhook: AdmissionReview in, JSONPatch out.
//!
//! ```text
//! review ─▶ wish (what the annotations say) ─▶ decide (which containers, what each gets) ─▶ inject ─▶ diff
//! ```
//! [`wish`](Wish), [`decide`] and [`inject`] are pure. **Invariant:** `f(f(pod)) = f(pod)`: API servers ask
//! again after other webhooks. **Invariant:** a pod without our annotations is answered with no patch.

mod args;
mod decide;
mod inject;
mod review;
mod server;
mod sidecars;
mod status;
mod wish;

pub use args::{Args, run};
pub use decide::{ContainerPlan, Decision, Denial, Plan, Policy, VolumePlan, decide};
pub use inject::inject;
pub use review::{Reviewer, review};
pub use server::{Serving, router};
pub use wish::{Command, Image, Selection, Wish, WishError};
