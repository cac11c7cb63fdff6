//! Nix's own database of valid paths: schema 10, as Nix 2.8 to 2.36 and Lix read and write it.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{io, str::FromStr as _};

use nix_csi_store::{ContentAddress, NarHash, NarInfo, StorePath};
use rusqlite::{Connection, OptionalExtension as _, ToSql, Transaction, TransactionBehavior, params};
use rustix::fs::FlockOperation;

use super::graph::Graph;
use super::layout::Layout;
use crate::path_error::PathError;

/// Written without a newline: with one, every Nix calls the schema corrupt.
const SCHEMA: &str = "10";

const TABLES: &str = "
create table if not exists ValidPaths (
    id integer primary key autoincrement not null,
    path text unique not null,
    hash text not null,
    registrationTime integer not null,
    deriver text,
    narSize integer,
    ultimate integer,
    sigs text,
    ca text
);
create table if not exists Refs (
    referrer integer not null,
    reference integer not null,
    primary key (referrer, reference),
    foreign key (referrer) references ValidPaths(id) on delete cascade,
    foreign key (reference) references ValidPaths(id) on delete restrict
);
create index if not exists IndexReferrer on Refs(referrer);
create index if not exists IndexReference on Refs(reference);
create trigger if not exists DeleteSelfRefs before delete on ValidPaths
  begin
    delete from Refs where referrer = old.id and reference = old.id;
  end;
create table if not exists DerivationOutputs (
    drv integer not null,
    id text not null,
    path text not null,
    primary key (drv, id),
    foreign key (drv) references ValidPaths(id) on delete cascade
);
create index if not exists IndexDerivationOutputs on DerivationOutputs(path);
";

/// Why the database did not answer.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// A file beside the database.
    #[error(transparent)]
    Io(#[from] PathError),
    /// A schema that this program does not know.
    #[error("{} says schema {found:?}, this program knows {SCHEMA}", path.display())]
    Schema {
        /// The file that says so.
        path: PathBuf,
        /// What it says.
        found: String,
    },
    /// SQLite.
    #[error("the store's database")]
    Sqlite(#[from] rusqlite::Error),
    /// A row that no Nix would write.
    #[error("the store's database has {0:?} where a store path must be")]
    Row(String),
    /// A reference that is neither valid nor being registered.
    #[error("{path} refers to {reference}, which is not valid")]
    DanglingReference {
        /// Who refers.
        path: StorePath,
        /// To what.
        reference: StorePath,
    },
}

/// What the store knows about a valid path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathInfo {
    /// The path.
    pub path: StorePath,
    /// SHA-256 of its NAR.
    pub nar_hash: NarHash,
    /// Length of its NAR.
    pub nar_size: u64,
    /// What it refers to, itself included.
    pub references: Vec<StorePath>,
    /// The derivation that built it.
    pub deriver: Option<StorePath>,
    /// Its signatures, so that it can be proved again elsewhere.
    pub signatures: Vec<String>,
    /// Its content address.
    pub ca: Option<String>,
}

impl From<NarInfo> for PathInfo {
    fn from(info: NarInfo) -> Self {
        Self {
            path: info.path,
            nar_hash: info.nar_hash,
            nar_size: info.nar_size,
            references: info.references,
            deriver: info.deriver,
            signatures: info.signatures.iter().map(ToString::to_string).collect(),
            // No signature covers it, and Nix cannot read a row with one that it does not understand.
            ca: info.ca.filter(|ca| ca.parse::<ContentAddress>().is_ok()),
        }
    }
}

/// An open database. One connection writes and one reads: a question never waits for a registration.
pub(super) struct Database {
    writer: Mutex<Connection>,
    reader: Mutex<Connection>,
    /// Shared as long as the store is open: only a schema migration wants it alone.
    _big_lock: File,
}

impl Database {
    pub(super) fn open(layout: &Layout) -> Result<Self, DatabaseError> {
        let dir = layout.db_dir();
        let big_lock = dir.join("big-lock");
        let lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&big_lock)
            .map_err(PathError::on("open", &big_lock))?;
        rustix::fs::flock(&lock, FlockOperation::LockShared).map_err(PathError::on("lock", &big_lock))?;
        let schema = dir.join("schema");
        match fs::read_to_string(&schema) {
            Ok(found) if found == SCHEMA => {}
            Ok(found) => return Err(DatabaseError::Schema { path: schema, found }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(PathError::on("read", &schema)(error).into()),
        }
        let writer = connect(&dir.join("db.sqlite"))?;
        writer.execute_batch(TABLES)?;
        // Last: a database without it is one whose tables may be missing.
        if !schema.exists() {
            let beside = dir.join(".schema");
            fs::write(&beside, SCHEMA)
                .and_then(|()| fs::rename(&beside, &schema))
                .map_err(PathError::on("write", &schema))?;
        }
        let reader = connect(&dir.join("db.sqlite"))?;
        Ok(Self { writer: Mutex::new(writer), reader: Mutex::new(reader), _big_lock: lock })
    }

    pub(super) fn valid(&self, paths: &[StorePath]) -> Result<HashSet<StorePath>, DatabaseError> {
        let connection = locked(&self.reader);
        let mut query = connection.prepare_cached("select 1 from ValidPaths where path = ?")?;
        let mut valid = HashSet::new();
        for path in paths {
            if query.exists([path.to_string()])? {
                valid.insert(path.clone());
            }
        }
        Ok(valid)
    }

    /// The NAR hashes of those of `paths` that are valid.
    pub(super) fn hashes(&self, paths: &[StorePath]) -> Result<HashMap<StorePath, NarHash>, DatabaseError> {
        let connection = locked(&self.reader);
        let mut query = connection.prepare_cached("select hash from ValidPaths where path = ?")?;
        let mut hashes = HashMap::new();
        for path in paths {
            let found: Option<String> = query.query_row([path.to_string()], |row| row.get(0)).optional()?;
            if let Some(hash) = found {
                hashes.insert(path.clone(), hash.parse().map_err(|_| DatabaseError::Row(hash))?);
            }
        }
        Ok(hashes)
    }

    /// All that one of `paths` refers to.
    pub(super) fn references(&self, paths: &[StorePath]) -> Result<HashSet<StorePath>, DatabaseError> {
        let connection = locked(&self.reader);
        let mut query = connection.prepare_cached(
            "select distinct referred.path from Refs
             join ValidPaths as referring on referrer = referring.id
             join ValidPaths as referred on reference = referred.id
             where referring.path in (select value from json_each(?))",
        )?;
        let rows = query.query_map([json(paths)], |row| row.get::<_, String>(0))?;
        rows.map(|path| store_path(&path?)).collect()
    }

    pub(super) fn closure(&self, roots: &[StorePath]) -> Result<Vec<StorePath>, DatabaseError> {
        let connection = locked(&self.reader);
        let mut query = connection.prepare_cached(
            "with recursive Closure(id) as (
                 select id from ValidPaths where path in (select value from json_each(?))
                 union
                 select reference from Refs join Closure on referrer = Closure.id)
             select path from ValidPaths join Closure using (id) order by path",
        )?;
        let rows = query.query_map([json(roots)], |row| row.get::<_, String>(0))?;
        rows.map(|path| store_path(&path?)).collect()
    }

    pub(super) fn register(&self, infos: &[&PathInfo]) -> Result<(), DatabaseError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut connection = locked(&self.writer);
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        insert(&transaction, infos, now.as_secs().cast_signed())?;
        Ok(transaction.commit()?)
    }

    /// The id of the newest row, or zero.
    pub(super) fn last_row(&self) -> Result<i64, DatabaseError> {
        let connection = locked(&self.reader);
        Ok(connection.query_row("select coalesce(max(id), 0) from ValidPaths", [], |row| row.get(0))?)
    }

    /// All paths whose rows are newer than `row`.
    pub(super) fn beyond(&self, row: i64) -> Result<Vec<PathInfo>, DatabaseError> {
        self.infos("id > ?", row)
    }

    /// A new database in `dir`, of these paths alone.
    pub(super) fn export(&self, paths: &[StorePath], dir: &Path) -> Result<(), DatabaseError> {
        let infos = self.infos("path in (select value from json_each(?))", json(paths))?;
        let mut connection = Connection::open(dir.join("db.sqlite"))?;
        // One file, which can be read where nothing can be written. It is made anew after a power cut.
        connection.pragma_update(None, "journal_mode", "delete")?;
        connection.pragma_update(None, "synchronous", "off")?;
        connection.execute_batch(TABLES)?;
        // Newer Nix adds it when it opens a store, which a read-only one does not let it.
        connection.execute_batch("create table SchemaMigrations (migration text primary key not null)")?;
        let transaction = connection.transaction()?;
        insert(&transaction, &infos.iter().collect::<Vec<_>>(), 1)?;
        transaction.commit()?;
        connection.close().map_err(|(_, error)| error)?;
        let schema = dir.join("schema");
        Ok(fs::write(&schema, SCHEMA).map_err(PathError::on("write", &schema))?)
    }

    /// What is known of those rows.
    fn infos(&self, which: &str, value: impl ToSql) -> Result<Vec<PathInfo>, DatabaseError> {
        let connection = locked(&self.reader);
        let mut query = connection.prepare_cached(&format!(
            "select id, path, hash, narSize, deriver, sigs, ca from ValidPaths where {which} order by id",
        ))?;
        let mut refer = connection.prepare_cached(
            "select path from Refs join ValidPaths on reference = id where referrer = ? order by path",
        )?;
        let mut infos = Vec::new();
        let mut rows = query.query([value])?;
        while let Some(row) = rows.next()? {
            let references = refer.query_map([row.get::<_, i64>(0)?], |row| row.get::<_, String>(0))?;
            let hash: String = row.get(2)?;
            let signatures: Option<String> = row.get(5)?;
            infos.push(PathInfo {
                path: store_path(&row.get::<_, String>(1)?)?,
                nar_hash: hash.parse().map_err(|_| DatabaseError::Row(hash))?,
                nar_size: row.get::<_, Option<i64>>(3)?.unwrap_or_default().cast_unsigned(),
                references: references.map(|path| store_path(&path?)).collect::<Result<_, _>>()?,
                deriver: row.get::<_, Option<String>>(4)?.and_then(|path| path.parse().ok()),
                signatures: signatures.iter().flat_map(|all| all.split(' ')).map(ToOwned::to_owned).collect(),
                ca: row.get(6)?,
            });
        }
        Ok(infos)
    }

    /// All valid paths, and what they refer to.
    pub(super) fn graph(&self) -> Result<Graph, DatabaseError> {
        let connection = locked(&self.reader);
        // One point in time for both questions.
        let transaction = Transaction::new_unchecked(&connection, TransactionBehavior::Deferred)?;
        let mut nodes = Vec::new();
        let mut numbers = HashMap::new();
        let mut query = transaction.prepare_cached("select id, path, narSize from ValidPaths order by id")?;
        let mut rows = query.query([])?;
        while let Some(row) = rows.next()? {
            numbers.insert(row.get::<_, i64>(0)?, nodes.len());
            let size: Option<i64> = row.get(2)?;
            nodes.push((store_path(&row.get::<_, String>(1)?)?, size.unwrap_or_default().cast_unsigned()));
        }
        let mut query = transaction.prepare_cached("select referrer, reference from Refs")?;
        let edges = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let edges: Vec<(i64, i64)> = edges.collect::<Result<_, _>>()?;
        let edges = edges.iter().filter_map(|(from, to)| Some((*numbers.get(from)?, *numbers.get(to)?)));
        Ok(Graph::new(nodes, edges))
    }

    /// Makes those of `paths` invalid that nothing else refers to but others of them. Gives them back.
    pub(super) fn delete(&self, paths: &[StorePath]) -> Result<Vec<StorePath>, DatabaseError> {
        if paths.is_empty() {
            return Ok(Vec::new());
        }
        let mut connection = locked(&self.writer);
        // On the disk before the files go: rows that a power cut brought back would have none.
        on_disk(&mut connection, |connection| delete(connection, paths))
    }

    /// Makes `paths` invalid, and all that refer to them. Gives back all that were valid.
    pub(super) fn invalidate(&self, paths: &[StorePath]) -> Result<Vec<StorePath>, DatabaseError> {
        if paths.is_empty() {
            return Ok(Vec::new());
        }
        let mut connection = locked(&self.writer);
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let found: Vec<(i64, String)> = {
            let mut query = transaction.prepare(
                "with recursive Referrers(id) as (
                     select id from ValidPaths where path in (select value from json_each(?))
                     union
                     select referrer from Refs join Referrers on reference = Referrers.id)
                 select id, path from ValidPaths join Referrers using (id)",
            )?;
            let rows = query.query_map([json(paths)], |row| Ok((row.get(0)?, row.get(1)?)))?;
            rows.collect::<Result<_, _>>()?
        };
        for (id, _) in &found {
            transaction.execute("delete from Refs where referrer = ?", [id])?;
        }
        for (id, _) in &found {
            transaction.execute("delete from ValidPaths where id = ?", [id])?;
        }
        transaction.commit()?;
        found.iter().map(|(_, path)| store_path(path)).collect()
    }
}

/// All rows first, then all references, so that the order of `infos` does not matter.
fn insert(transaction: &Transaction<'_>, infos: &[&PathInfo], time: i64) -> Result<(), DatabaseError> {
    let mut insert = transaction.prepare_cached(
        "insert into ValidPaths (path, hash, registrationTime, deriver, narSize, sigs, ca)
         values (?, ?, ?, ?, ?, ?, ?)",
    )?;
    let mut find = transaction.prepare_cached("select id from ValidPaths where path = ?")?;
    let mut refer =
        transaction.prepare_cached("insert or ignore into Refs (referrer, reference) values (?, ?)")?;
    // Most references are within what is registered, and to the same few paths.
    let mut ids: HashMap<&StorePath, i64> = HashMap::with_capacity(infos.len());
    for info in infos {
        insert.execute(params![
            info.path.to_string(),
            info.nar_hash.to_base16(),
            time,
            info.deriver.as_ref().map(ToString::to_string),
            info.nar_size.cast_signed(),
            (!info.signatures.is_empty()).then(|| info.signatures.join(" ")),
            info.ca,
        ])?;
        ids.insert(&info.path, transaction.last_insert_rowid());
    }
    for info in infos {
        let id = ids[&info.path];
        for reference in &info.references {
            let known = ids.get(reference).copied();
            let to = known.map_or_else(
                || find.query_row([reference.to_string()], |row| row.get(0)).optional(),
                |id| Ok(Some(id)),
            )?;
            let to = to.ok_or_else(|| DatabaseError::DanglingReference {
                path: info.path.clone(),
                reference: reference.clone(),
            })?;
            ids.insert(reference, to);
            refer.execute([id, to])?;
        }
    }
    Ok(())
}

/// Deletes those of `paths` that nothing else refers to but others of them.
fn delete(connection: &mut Connection, paths: &[StorePath]) -> Result<Vec<StorePath>, DatabaseError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let doomed: Vec<String> = {
        // What stays refers to some of them perhaps: those stay too, with all that they refer to.
        let mut query = transaction.prepare(
                "with recursive Doomed(id) as materialized (
                     select id from ValidPaths where path in (select value from json_each(?))),
                 Needed(id) as (
                     select reference from Refs
                         where reference in (select id from Doomed) and referrer not in (select id from Doomed)
                     union
                     select reference from Refs join Needed on referrer = Needed.id)
                 select path from ValidPaths join Doomed using (id)
                     where id not in (select id from Needed) order by id",
            )?;
        let rows = query.query_map([json(paths)], |row| row.get(0))?;
        rows.collect::<Result<_, _>>()?
    };
    {
        let mut forget = transaction
            .prepare_cached("delete from Refs where referrer = (select id from ValidPaths where path = ?)")?;
        let mut delete = transaction.prepare_cached("delete from ValidPaths where path = ?")?;
        for path in &doomed {
            forget.execute([path])?;
        }
        for path in &doomed {
            delete.execute([path])?;
        }
    }
    transaction.commit()?;
    doomed.iter().map(|path| store_path(path)).collect()
}

/// Does what commits, so that it is on the disk when this returns.
pub(super) fn on_disk<T, E: From<rusqlite::Error>>(
    connection: &mut Connection,
    work: impl FnOnce(&mut Connection) -> Result<T, E>,
) -> Result<T, E> {
    connection.pragma_update(None, "synchronous", "full")?;
    let done = work(connection);
    connection.pragma_update(None, "synchronous", "normal")?;
    done
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(Duration::from_mins(1))?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    connection.pragma_update(None, "synchronous", "normal")?;
    connection.pragma_update(None, "wal_autocheckpoint", 40_000)?;
    Ok(connection)
}

fn locked(connection: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
    // A panic cannot leave a transaction half done: dropping one rolls it back.
    connection.lock().unwrap_or_else(PoisonError::into_inner)
}

fn json(paths: &[StorePath]) -> String {
    serde_json::json!(paths.iter().map(ToString::to_string).collect::<Vec<_>>()).to_string()
}

fn store_path(text: &str) -> Result<StorePath, DatabaseError> {
    StorePath::from_str(text).map_err(|_| DatabaseError::Row(text.to_owned()))
}
