//! The admission webhook: AdmissionReview in, JSONPatch out.
//!
//! ```text
//! review ─▶ wish (what annotations say) ─▶ source (whose word counts) ─▶ decide, planner ─▶ inject ─▶ diff
//! ```
//! All of these but the review are pure. **Invariant:** `f(f(pod)) = f(pod)`: API servers ask
//! again after other webhooks. **Invariant:** a pod without our annotations is answered with no patch.

mod args;
mod decide;
mod inject;
mod origin;
mod plan;
mod planner;
mod review;
mod server;
mod sidecars;
mod source;
mod status;
mod wish;

pub use args::{Args, run};
pub use decide::{Decision, Denial, Policy, decide};
pub use inject::inject;
pub use origin::{Namespace, ObjectRef, Origin, Owner};
pub use plan::{ContainerPlan, Plan, VolumePlan};
pub use review::{Reviewer, review};
pub use server::{Serving, router};
pub use source::Source;
pub use wish::{Command, Image, Mode, Selection, Wish, WishError};
