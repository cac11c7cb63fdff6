//! The entries of our MutatingWebhookConfiguration. Their conditions exclude each other: a pod comes by one at most.

/// By which entry a pod comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// The pod has annotations of ours.
    Pod,
    /// It has none, and its Namespace is opted in.
    Namespace,
    /// It has none, its Namespace says nothing, and something owns it.
    Owner,
    /// It exists, and gets a container to debug it.
    Debug,
}

impl Entry {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Pod, Self::Namespace, Self::Owner, Self::Debug];

    /// One word for metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Namespace => "namespace",
            Self::Owner => "owner",
            Self::Debug => "debug",
        }
    }

    /// Where its reviews are sent.
    pub fn path(self) -> &'static str {
        match self {
            Self::Pod => "/mutate",
            Self::Namespace => "/mutate/namespace",
            Self::Owner => "/mutate/owner",
            Self::Debug => "/mutate/debug",
        }
    }
}
