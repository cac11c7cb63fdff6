//! The admission webhook: AdmissionReview in, JSONPatch out.
//!
//! ```text
//! review ─▶ wish (what annotations say) ─▶ source (whose word counts) ─▶ decide, planner ─▶ inject ─▶ diff
//! ```
//! All of these but the review are pure. **Invariant:** `f(f(pod)) = f(pod)`: API servers ask
//! again after other webhooks. **Invariant:** a pod for which nobody asks is answered with no patch.

mod args;
mod debug;
mod decide;
mod entry;
mod environment;
mod events;
mod explain;
mod farm;
mod image;
mod image_map;
mod image_map_watch;
mod index;
mod inject;
mod kinds;
mod metrics;
mod needs;
mod origin;
mod origins;
mod plan;
mod planner;
mod review;
mod server;
mod sidecars;
mod source;
mod status;
mod uninjected;
mod wish;

pub use args::{Args, run};
pub use debug::debug;
pub use decide::{Decision, Denial, Policy, decide};
pub use entry::Entry;
pub use environment::Environment;
pub use events::{Event, Events, Reason};
pub use explain::{Explain, Explanation};
pub use farm::{Farm, Farmed};
pub use image::{ImageReference, ParseImageError};
pub use image_map::{Found, ImageMapError, ImageMapSpec, ImageMaps, ImageRule, Replacement};
pub use inject::inject;
pub use kinds::{OwnerKind, ParseOwnerKindError};
pub use metrics::Metrics;
pub use origin::{Namespace, ObjectRef, Origin, Owner};
pub use origins::{OriginError, Origins};
pub use plan::{ContainerPlan, Plan, VolumePlan};
pub use review::{Reviewer, review};
pub use server::{Serving, observed, router};
pub use source::Source;
pub use wish::{Command, Image, Mode, Selection, Wish, WishError};
