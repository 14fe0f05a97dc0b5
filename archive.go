package main

import (
	"archive/tar"
	"cmp"
	"compress/gzip"
	"errors"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
)

const (
	maxEntryPath = 1024      // bytes
	maxDepth     = 64        // directories in an entry's path
	writeChunk   = 128 << 10 // bytes of a file that are written at a time
)

// unpackLimits bound what one archive may make.
type unpackLimits struct {
	bytes   int64 // of the decompressed stream, so that headers and padding count too
	entries int64
}

// unpack lays out a gzipped tar stream in dir: directories, regular files, symbolic and
// hard links, as tar would, but nothing outside dir and nothing that is more than data.
// Owners are the archive's, or all o if that is given; only root can give files away.
func unpack(r io.Reader, dir *os.Root, limits unpackLimits, o *owner) error {
	zipped, err := gzip.NewReader(r)
	if err != nil {
		return broken(err)
	}
	stream := &limitedReader{r: zipped, left: limits.bytes}
	archive := tar.NewReader(stream)
	parent, err := dir.OpenRoot(".")
	if err != nil {
		return err
	}
	u := &unpacker{root: dir, ownedBy: o, asRoot: os.Geteuid() == 0, buffer: make([]byte, writeChunk),
		parent: parent, parentDir: "."}
	defer func() { u.parent.Close() }()
	size := int64(0) // of the files: a sparse one can have any size in a short stream
	for entries := int64(1); ; entries++ {
		header, err := archive.Next()
		if err == io.EOF {
			return broken(stream.drain(io.Discard)) // only at the stream's end is its checksum verified
		}
		if err != nil {
			return broken(err)
		}
		if size += max(header.Size, 0); size > limits.bytes || size < 0 {
			return failure(tooLarge, "bind_contents: entry %q: more than %d bytes", header.Name, limits.bytes)
		}
		if err := u.add(header, archive); err != nil {
			return err
		}
		if entries+u.implied > limits.entries {
			return failure(tooLarge, "bind_contents: more than %d entries", limits.entries)
		}
	}
}

// broken says why an archive cannot be read on.
func broken(err error) error {
	if err == nil || isA[*apiError](err) {
		return err
	}
	return refuse("the archive is broken: %s", plain(err))
}

// refuse returns an error for an archive that is not to be laid out.
func refuse(format string, args ...any) error {
	return failure(refusedArchive, "bind_contents: "+format, args...)
}

// limitedReader fails when there is more than it may give; [io.LimitedReader] would end as if that
// were all.
type limitedReader struct {
	r     io.Reader
	left  int64
	ended bool // a read met the end
}

// Read counts what was read, not what was asked for: a stream that ends just at the limit is whole.
func (l *limitedReader) Read(p []byte) (int, error) {
	n, err := l.r.Read(p)
	l.ended = l.ended || err == io.EOF && n == 0
	if l.left -= int64(n); l.left < 0 {
		return 0, failure(tooLarge, "bind_contents: the archive unpacks to too many bytes")
	}
	return n, err
}

// drain reads on from where a [tar.Reader] met an archive's end. That takes the end of its input
// for the archive's end too: but then the end mark, two blocks of zeros, was cut off, and drain
// returns an error.
func (l *limitedReader) drain(to io.Writer) error {
	if l.ended {
		return io.ErrUnexpectedEOF
	}
	_, err := io.Copy(to, l)
	return err
}

// unpacker lays out entries under root. It works from the opened parent directory of
// each, to which it has walked without passing a link, and keeps that for the next.
type unpacker struct {
	root      *os.Root
	ownedBy   *owner
	asRoot    bool
	buffer    []byte
	parent    *os.Root // of the last entry, or another handle of root
	parentDir string   // its path
	implied   int64    // directories made that only a path named
}

// add lays out one entry, in the place of an earlier one that is no directory.
func (u *unpacker) add(h *tar.Header, content io.Reader) error {
	name := path.Clean(h.Name)
	switch {
	case h.Typeflag == tar.TypeXGlobalHeader:
		return nil
	case outside(h.Name) || name == "." && h.Typeflag != tar.TypeDir:
		return refuse("entry %q: its path leads out of the archive", h.Name)
	case len(name) > maxEntryPath || strings.Count(name, "/") > maxDepth: // deeper ones cost too much to walk
		return refuse("entry %q: its path has more than %d bytes or %d directories", h.Name, maxEntryPath, maxDepth)
	case h.Uid < 0 || h.Uid > math.MaxInt32 || h.Gid < 0 || h.Gid > math.MaxInt32:
		return refuse("entry %q: its owner is out of range", h.Name) // to chown, 4294967295 means unchanged
	case name == ".":
		return u.root.Chmod(".", permissions(h))
	}
	parent, err := u.enter(path.Dir(name), true)
	if err == nil {
		err = u.place(parent, name, h, content)
	}
	if errors.Is(err, fs.ErrExist) { // an earlier entry is there: rare enough not to look for it each time
		if parent, err = u.enter(path.Dir(name), false); err == nil {
			err = makeRoom(parent, path.Base(name))
		}
		if err == nil {
			err = u.place(parent, name, h, content)
		}
	}
	for _, cause := range []error{errThroughLink, errReplacesDir, errLinkTarget, errSymlink, errType,
		syscall.ENAMETOOLONG, syscall.EINVAL, syscall.EMLINK} {
		if errors.Is(err, cause) {
			return refuse("entry %q: %v", h.Name, cause)
		}
	}
	return err
}

var (
	errThroughLink = errors.New("its path passes something that is not a directory")
	errReplacesDir = errors.New("it would replace a directory")
	errLinkTarget  = errors.New("it is a hard link to something that is not an earlier file")
	errSymlink     = errors.New("it is a symbolic link that leads out of the archive")
	errType        = errors.New("it is not a directory, file or link")
)

// outside reports whether a path is not one below the archive's root.
func outside(name string) bool {
	return name == "" || path.IsAbs(name) || slices.Contains(strings.Split(name, "/"), "..")
}

// staysInside reports whether a symbolic link in dir, a path below the root, to target stays below the
// root whatever other such links it passes. It may lead upwards only at its beginning, from dir itself,
// which is no link. So in a/b:
//
//	c, ../c, ./../../c   stay inside, at a/b/c, a/c and c
//	../../../c           does not: it leads above the root
//	/etc                 does not, in a service or on the host
//	c/../../d            may not: where c is a link to x/y/z, it means x/d and not a/d
func staysInside(dir, target string) bool {
	parts := strings.Split(target, "/")
	for len(parts) > 0 && slices.Contains([]string{"", ".", ".."}, parts[0]) {
		parts = parts[1:]
	}
	return target != "" && !path.IsAbs(target) && !slices.Contains(parts, "..") &&
		!outside(path.Join(dir, target))
}

// makeRoom removes an earlier entry that is no directory.
func makeRoom(parent *os.Root, base string) error {
	earlier, err := parent.Lstat(base)
	if err != nil {
		return err
	}
	if earlier.IsDir() {
		return errReplacesDir
	}
	return parent.Remove(base)
}

// place puts an entry where nothing is, or, if it is a directory, where one is.
func (u *unpacker) place(parent *os.Root, name string, h *tar.Header, content io.Reader) (err error) {
	base := path.Base(name)
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		return u.placeFile(parent, base, h, content)
	case tar.TypeLink:
		return u.placeLink(name, h.Linkname) // which may close parent
	case tar.TypeSymlink:
		if !staysInside(path.Dir(name), h.Linkname) {
			return errSymlink
		}
		err = parent.Symlink(h.Linkname, base)
	case tar.TypeDir:
		if err = parent.Mkdir(base, 0o700); errors.Is(err, fs.ErrExist) {
			if earlier, statErr := parent.Lstat(base); statErr == nil && earlier.IsDir() {
				err = nil // it gets this entry's mode and owner
			}
		}
	default:
		return errType
	}
	if err == nil && u.asRoot {
		o := u.ownerOf(h)
		err = parent.Lchown(base, o.uid, o.gid)
	}
	if err == nil && h.Typeflag == tar.TypeDir {
		err = parent.Chmod(base, permissions(h))
	}
	return err
}

// ownerOf returns whom an entry is to belong to.
func (u *unpacker) ownerOf(h *tar.Header) *owner { return cmp.Or(u.ownedBy, &owner{h.Uid, h.Gid}) }

// permissions leaves out the setuid, setgid and sticky bits.
func permissions(h *tar.Header) fs.FileMode { return h.FileInfo().Mode().Perm() }

// placeFile never goes through an earlier link: its file must be new. O_NONBLOCK means nothing to a
// file, but spares the four system calls in which package os would find that out.
func (u *unpacker) placeFile(parent *os.Root, base string, h *tar.Header, content io.Reader) error {
	f, err := parent.OpenFile(base, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.CopyBuffer(struct{ io.Writer }{f}, content, u.buffer)
	if err != nil && !isA[*fs.PathError](err) {
		return broken(err)
	}
	if err == nil && u.asRoot {
		o := u.ownerOf(h)
		err = f.Chown(o.uid, o.gid)
	}
	if err == nil {
		err = f.Chmod(permissions(h))
	}
	if err == nil {
		err = parent.Chtimes(base, h.ModTime, h.ModTime)
	}
	return cmp.Or(err, f.Close())
}

// placeLink makes a hard link to a regular file that an earlier entry made.
func (u *unpacker) placeLink(name, target string) error {
	if outside(target) {
		return errLinkTarget
	}
	target = path.Clean(target)
	parent, err := u.enter(path.Dir(target), false)
	var info fs.FileInfo
	if err == nil {
		info, err = parent.Lstat(path.Base(target))
	}
	if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
		return errLinkTarget
	}
	if err != nil {
		return err
	}
	return u.root.Link(target, name) // neither passes a link
}

// enter returns the directory dir, and makes what is missing on the way there if it is told
// to. It walks there without passing a link. The unpacker closes it.
func (u *unpacker) enter(dir string, create bool) (*os.Root, error) {
	if u.parentDir == dir {
		return u.parent, nil
	}
	at, err := u.root.OpenRoot(".")
	if err != nil {
		return nil, err
	}
	for part := range strings.SplitSeq(dir, "/") {
		info, err := at.Lstat(part)
		if create && errors.Is(err, fs.ErrNotExist) {
			u.implied++
			err = u.place(at, part, &tar.Header{Typeflag: tar.TypeDir, Mode: 0o755}, nil)
		} else if err == nil && !info.IsDir() {
			err = errThroughLink
		}
		var below *os.Root
		if err == nil {
			below, err = at.OpenRoot(part)
		}
		at.Close()
		if err != nil {
			return nil, err
		}
		at = below
	}
	u.parent.Close()
	u.parent, u.parentDir = at, dir
	return at, nil
}
