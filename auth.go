package main

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
)

const (
	coreKeyHeader = "X-Duxcore-Corekey" // X-Duxcore-CoreKey in canonical form
	minKeyBytes   = 16
	maxKeyBytes   = 4096
)

// coreKey is the SHA-256 sum of what the header must say, the core key in base64: of one
// length whatever the key's, and no secret to guess at when it shows in a core dump.
type coreKey [sha256.Size]byte

// authorizes reports whether r carries the core key, once. It decodes nothing: a key has
// only one strict base64 form. It compares sums because [subtle.ConstantTimeCompare]
// returns early on unequal lengths.
func (k coreKey) authorizes(r *http.Request) bool {
	values := r.Header[coreKeyHeader]
	if len(values) != 1 {
		return false
	}
	sum := sha256.Sum256([]byte(values[0]))
	return subtle.ConstantTimeCompare(sum[:], k[:]) == 1
}

// keyDraft matches the names of files in which a core key is made.
var keyDraft = regexp.MustCompile(`^\.corekey-[0-9]+$`)

// loadCoreKey reads the core key from path, or creates one there if nothing is there.
// A key that is short, long, unreadable or no regular file is an error: a daemon
// without a good key would be open to everyone.
func loadCoreKey(path string, log *slog.Logger) (coreKey, error) {
	dir := filepath.Dir(path)
	entries, tidyErr := os.ReadDir(dir)
	for _, entry := range entries {
		if name := entry.Name(); keyDraft.MatchString(name) && name != filepath.Base(path) {
			// Of a daemon that died. It may be the key itself, by a second name.
			tidyErr = cmp.Or(tidyErr, os.Remove(filepath.Join(dir, name)))
		}
	}
	if tidyErr != nil && !errors.Is(tidyErr, fs.ErrNotExist) {
		log.Warn("cannot remove what an earlier start may have left beside the core key", "err", tidyErr)
	}
	info, err := os.Stat(path)
	created := errors.Is(err, fs.ErrNotExist)
	if created {
		if err := createCoreKey(path); err != nil {
			return coreKey{}, fmt.Errorf("cannot create the core key: %w", err)
		}
		log.Info("core key created", "path", path)
		info, err = os.Stat(path)
	}
	var key []byte
	if err == nil && info.Mode().IsRegular() && info.Size() <= maxKeyBytes {
		key, err = os.ReadFile(path)
	}
	if err == nil && len(key) < minKeyBytes { // or not read
		err = fmt.Errorf("the core key %s must be a file of %d to %d bytes", path, minKeyBytes, maxKeyBytes)
	}
	// A start that died may have made it, and not synced it.
	syncErr := cmp.Or(syncFile(path), syncFile(dir))
	if created {
		err = cmp.Or(err, syncErr)
	}
	if err != nil {
		return coreKey{}, err
	}
	if syncErr != nil { // on an image that cannot be written, say
		log.Warn("cannot make sure that the core key survives a power cut", "err", syncErr)
	}
	if info.Mode().Perm()&0o077 != 0 {
		log.Warn("others can read the core key", "path", path, "mode", info.Mode().Perm())
	}
	return sha256.Sum256([]byte(base64.StdEncoding.EncodeToString(key))), nil
}

// syncFile makes a file durable, or the names in a directory.
func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// createCoreKey writes a random key beside path and links it into place, so that a
// crash leaves either no key or a whole one, and a key that is there is never replaced.
func createCoreKey(path string) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".corekey-*") // a keyDraft; mode 0600
	if err != nil {
		return err
	}
	defer f.Close()
	key := make([]byte, 32)
	rand.Read(key)
	_, err = f.Write(key)
	if err = cmp.Or(err, f.Sync()); err == nil {
		err = os.Link(f.Name(), path)
	}
	return cmp.Or(err, os.Remove(f.Name()))
}
