//! Where each path came from, and who may see those that came with somebody's own credentials.
//!
//! A database of its own, because Nix's has no room for it. A path that is not in it is nobody's in particular: it
//! was built here, or copied by an administrator.
//!
//! **Invariant:** a path that only a volume's own credentials could fetch is marked as private, on the disk, before
//! it is valid. So there is no moment, and no power cut, after which it looks like everybody's.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::db::on_disk;
use nix_csi_store::StorePath;
use rusqlite::{Connection, OptionalExtension as _, Transaction, TransactionBehavior, params};

/// Counts changes of the tables.
const VERSION: i64 = 1;

const TABLES: &str = "
create table Provenance (
    path text primary key not null,
    cache text not null,
    key text,
    private integer not null
) without rowid;
create table Granted (
    namespace text not null,
    path text not null,
    primary key (namespace, path)
) without rowid;
create index GrantedByPath on Granted(path);
";

/// Why it is not known where paths came from.
#[derive(Debug, thiserror::Error)]
pub enum ProvenanceError {
    /// Written by a newer program.
    #[error("{} has version {found}, this program knows {VERSION}; use the newer program", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// What it says.
        found: i64,
    },
    /// SQLite. Without this database nobody can say which paths are private.
    #[error("the database of provenance {}", path.display())]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
}

/// Where a path came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The cache, as it is named in messages.
    pub cache: Arc<str>,
    /// The name of the key that signed it; none if it proved itself by its content, or did not need to.
    pub key: Option<String>,
    /// Whether the cache gave it for a volume's own credentials only.
    pub private: bool,
}

/// The database.
pub(super) struct Provenance {
    path: PathBuf,
    connection: Mutex<Connection>,
}

impl Provenance {
    pub(super) fn open(path: &Path) -> Result<Self, ProvenanceError> {
        let failed = |source| ProvenanceError::Sqlite { path: path.into(), source };
        let connection = Connection::open(path).map_err(failed)?;
        let set_up = || {
            connection.busy_timeout(Duration::from_mins(1))?;
            connection.pragma_update(None, "journal_mode", "wal")?;
            connection.pragma_update(None, "synchronous", "normal")?;
            let version = |of: &Connection| of.pragma_query_value(None, "user_version", |row| row.get(0));
            let mut found: i64 = version(&connection)?;
            if found == 0 {
                let new = Transaction::new_unchecked(&connection, TransactionBehavior::Immediate)?;
                // Another process may have been faster.
                if version(&new)? == 0 {
                    new.execute_batch(TABLES)?;
                    new.pragma_update(None, "user_version", VERSION)?;
                }
                new.commit()?;
                found = version(&connection)?;
            }
            Ok(found)
        };
        let found = set_up().map_err(failed)?;
        if found != VERSION {
            return Err(ProvenanceError::Version { path: path.into(), found });
        }
        Ok(Self { path: path.into(), connection: Mutex::new(connection) })
    }

    /// Writes down where paths that are about to become valid come from. Whoever was allowed to see an earlier
    /// path of that name is not any more.
    pub(super) fn record(&self, paths: &[(&StorePath, &Origin)]) -> Result<(), ProvenanceError> {
        let is_private = paths.iter().any(|(_, origin)| origin.private);
        self.change(is_private, |transaction| {
            let mut insert = transaction.prepare_cached(
                "insert or replace into Provenance (path, cache, key, private) values (?, ?, ?, ?)",
            )?;
            let mut revoke = transaction.prepare_cached("delete from Granted where path = ?")?;
            for (path, origin) in paths {
                let name = path.base_name();
                insert.execute(params![name, origin.cache, origin.key, origin.private])?;
                revoke.execute([name])?;
            }
            Ok(())
        })
    }

    /// What is written down about `path`.
    pub(super) fn of(&self, path: &StorePath) -> Result<Option<Origin>, ProvenanceError> {
        let origin = |row: &rusqlite::Row<'_>| {
            Ok(Origin { cache: row.get::<_, String>(0)?.into(), key: row.get(1)?, private: row.get(2)? })
        };
        self.locked()
            .prepare_cached("select cache, key, private from Provenance where path = ?")
            .and_then(|mut query| query.query_row([path.base_name()], origin).optional())
            .map_err(|source| self.failed(source))
    }

    /// The base names of all paths that are written down.
    pub(super) fn names(&self) -> Result<HashSet<String>, ProvenanceError> {
        let connection = self.locked();
        let names = || {
            let mut query = connection.prepare_cached("select path from Provenance")?;
            query.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()
        };
        names().map_err(|source| self.failed(source))
    }

    /// Those of `paths` that are private and not granted to `namespace`.
    pub(super) fn denied(
        &self,
        namespace: &str,
        paths: &[StorePath],
    ) -> Result<Vec<StorePath>, ProvenanceError> {
        let names: Vec<_> = paths.iter().map(StorePath::base_name).collect();
        let connection = self.locked();
        let denied = || {
            let mut query = connection.prepare_cached(
                "select path from Provenance
                 where private and path in (select value from json_each(?1))
                   and not exists (select 1 from Granted where namespace = ?2 and Granted.path = Provenance.path)
                 order by path",
            )?;
            let rows = query
                .query_map(params![serde_json::json!(names).to_string(), namespace], |row| row.get(0))?;
            rows.collect::<Result<Vec<String>, _>>()
        };
        let denied = denied().map_err(|source| self.failed(source))?;
        Ok(denied.iter().filter_map(|name| StorePath::from_base_name(name).ok()).collect())
    }

    /// From now on `namespace` may see `paths`.
    pub(super) fn grant(&self, namespace: &str, paths: &[StorePath]) -> Result<(), ProvenanceError> {
        self.change(false, |transaction| {
            let mut grant = transaction
                .prepare_cached("insert or ignore into Granted (namespace, path) values (?, ?)")?;
            for path in paths {
                grant.execute([namespace, path.base_name()])?;
            }
            Ok(())
        })
    }

    /// These paths are not private, or not any more: that cache gives them to everybody.
    pub(super) fn make_public(&self, paths: &[(&StorePath, &Origin)]) -> Result<(), ProvenanceError> {
        self.change(false, |transaction| {
            let mut update = transaction.prepare_cached(
                "update Provenance set private = 0, cache = ?2, key = ?3 where path = ?1 and private",
            )?;
            for (path, origin) in paths {
                update.execute(params![path.base_name(), origin.cache, origin.key])?;
            }
            Ok(())
        })
    }

    /// These paths are not valid any more.
    pub(super) fn forget(&self, paths: &[StorePath]) -> Result<(), ProvenanceError> {
        self.change(false, |transaction| {
            let mut forget = transaction.prepare_cached("delete from Provenance where path = ?")?;
            let mut revoke = transaction.prepare_cached("delete from Granted where path = ?")?;
            for path in paths {
                revoke.execute([path.base_name()])?;
                forget.execute([path.base_name()])?;
            }
            Ok(())
        })
    }

    /// One transaction. With `is_durable` it is on the disk when this returns.
    fn change(
        &self,
        is_durable: bool,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<()>,
    ) -> Result<(), ProvenanceError> {
        let change = |connection: &mut Connection| {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            work(&transaction)?;
            transaction.commit()
        };
        let mut connection = self.locked();
        let changed = if is_durable { on_disk(&mut connection, change) } else { change(&mut connection) };
        changed.map_err(|source| self.failed(source))
    }

    fn locked(&self) -> MutexGuard<'_, Connection> {
        // A panic cannot leave a transaction half done: dropping one rolls it back.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, source: rusqlite::Error) -> ProvenanceError {
        ProvenanceError::Sqlite { path: self.path.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(c: char) -> StorePath {
        StorePath::from_base_name(&format!("{}-x", c.to_string().repeat(32))).unwrap()
    }

    fn origin(private: bool) -> Origin {
        Origin { cache: "https://cache.example/".into(), key: Some("key-1".into()), private }
    }

    #[test]
    fn a_private_path_is_denied_until_it_is_granted_or_public() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("provenance.sqlite");
        let (open, secret, other) = (path('a'), path('b'), path('c'));
        let paths = [open.clone(), secret.clone(), other.clone()];
        let provenance = Provenance::open(&file).unwrap();
        provenance.record(&[(&open, &origin(false)), (&secret, &origin(true))]).unwrap();
        assert_eq!(provenance.denied("a", &paths).unwrap(), std::slice::from_ref(&secret));
        provenance.grant("a", std::slice::from_ref(&secret)).unwrap();

        // It is not only in memory.
        let provenance = Provenance::open(&file).unwrap();
        assert_eq!(provenance.denied("a", &paths).unwrap(), []);
        assert_eq!(provenance.denied("b", &paths).unwrap(), std::slice::from_ref(&secret));
        assert_eq!(provenance.of(&secret).unwrap(), Some(origin(true)));
        assert_eq!(provenance.of(&other).unwrap(), None);

        // Another path of that name is not what was granted.
        provenance.record(&[(&secret, &origin(true))]).unwrap();
        assert_eq!(provenance.denied("a", &paths).unwrap(), std::slice::from_ref(&secret));
        provenance.make_public(&[(&secret, &origin(false))]).unwrap();
        assert_eq!(provenance.denied("b", &paths).unwrap(), []);
        provenance.forget(&paths).unwrap();
        assert_eq!(provenance.of(&secret).unwrap(), None);
    }
}
