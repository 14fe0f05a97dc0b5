package main

import (
	"bytes"
	"context"
	"maps"
	"net/http"
	"slices"
	"strings"
)

// createBody is the body of POST and PUT.
type createBody struct {
	Type   string        `json:"type"`
	Params serviceParams `json:"params"`
}

// readParams reads and checks the parameters of a service.
func readParams(r *http.Request) (serviceParams, error) {
	var body createBody
	if err := readJSON(r, &body); err != nil {
		return serviceParams{}, err
	}
	if body.Type != "raw" {
		return serviceParams{}, badRequest(`type: must be "raw"`)
	}
	return body.Params, body.Params.check()
}

// handleCreate answers POST /service.
func (s *services) handleCreate(w http.ResponseWriter, r *http.Request) error {
	params, err := readParams(r)
	noteChange(w, truncate(params.ID), "create")
	if err != nil {
		return err
	}
	if err := s.create(r.Context(), params, r.Header.Get("X-Registry-Auth")); err != nil {
		return err
	}
	w.Header().Set("Location", "/service/"+params.ID)
	return nil
}

// handlePut answers PUT /service/{id}.
func (s *services) handlePut(w http.ResponseWriter, r *http.Request) error {
	noteChange(w, r.PathValue("id"), "put")
	params, err := readParams(r)
	if err != nil {
		return err
	}
	if params.ID != r.PathValue("id") {
		return badRequest("id: must be the one in the path, %q", r.PathValue("id"))
	}
	if params.BindContents != "" {
		return badRequest("bind_contents: only a create unpacks an archive")
	}
	return s.setParams(r.Context(), params.ID, params, r.Header.Get("X-Registry-Auth"))
}

// handleParams answers GET /service/{id}/params with the parameters of the service's record.
func (s *services) handleParams(w http.ResponseWriter, r *http.Request) error {
	record, err := s.record(r.PathValue("id"))
	if err != nil {
		return err
	}
	body := struct {
		Params  serviceParams  `json:"params"`
		Pending *serviceParams `json:"pending,omitempty"`
	}{Params: record.Params}
	if record.Pending != nil {
		body.Pending = &record.Pending.Params
	}
	writeJSON(w, http.StatusOK, body)
	return nil
}

// handleList answers GET /service with the engine's list, of this daemon's services alone. One broken service
// must not be an error for all: it is left out, and logged.
func (s *services) handleList(w http.ResponseWriter, r *http.Request) error {
	if err := s.checkRoot(r.Context()); err != nil {
		return err
	}
	all, err := s.containers.all(r.Context())
	if err != nil {
		return err
	}
	ids, err := s.binds.existing()
	if err != nil {
		return err
	}
	if all, err = s.awaitContainers(r.Context(), ids, all); err != nil {
		return err
	}
	list := make([][]byte, 0, len(ids))
	for _, id := range ids {
		if entry := all[id].current; entry != nil {
			list = append(list, entry.raw)
		} else {
			s.log.Warn("a service was left out of the list: it has no container of its name", "id", id)
		}
	}
	writeBytes(w, http.StatusOK, slices.Concat([]byte("["), bytes.Join(list, []byte(",")), []byte("]\n")))
	return nil
}

// awaitContainers returns all if that has a container of every service. Otherwise a start may be replacing
// one: it waits for operations on the services without one, for a third of engineRead, and lists again.
func (s *services) awaitContainers(ctx context.Context, ids []string, all map[string]serviceContainers) (
	map[string]serviceContainers, error) {
	waiting, cancel := context.WithTimeout(ctx, s.config.timeouts.engineRead/3)
	defer cancel()
	missing := false
	for _, id := range ids {
		if all[id].current != nil {
			continue
		}
		missing = true
		if unlock, err := s.locks.lock(waiting, id); err == nil {
			defer unlock() // not before the second list: another start could come in between
		}
	}
	if !missing {
		return all, nil
	}
	return s.containers.all(ctx)
}

// handleInspect answers GET /service/{id} with the engine's answer, byte for byte.
func (s *services) handleInspect(w http.ResponseWriter, r *http.Request) error {
	current, err := s.containers.lookup(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	writeBytes(w, http.StatusOK, current.raw)
	return nil
}

// handleDelete answers DELETE /service/{id} when everything that belonged to the service is removed.
func (s *services) handleDelete(w http.ResponseWriter, r *http.Request) error {
	noteChange(w, r.PathValue("id"), "delete")
	return s.remove(r.Context(), r.PathValue("id"))
}

// handleControl answers POST /service/{id}/ctl.
func (s *services) handleControl(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		Op string `json:"op"`
	}
	if err := readJSON(r, &body); err != nil {
		return err
	}
	ctx, id := r.Context(), r.PathValue("id")
	if slices.Contains([]string{"start", "stop", "restart", "kill"}, body.Op) {
		noteChange(w, id, body.Op)
	}
	switch body.Op {
	case "start":
		return s.change(ctx, id, s.start)
	case "stop":
		return s.change(ctx, id, s.stop)
	case "restart":
		return s.change(ctx, id, s.restart)
	case "kill":
		return s.kill(ctx, id)
	}
	return badRequest("op: must be start, stop, restart or kill")
}

// handleSetEnv answers PATCH /service/{id}/env.
func (s *services) handleSetEnv(w http.ResponseWriter, r *http.Request) error {
	noteChange(w, r.PathValue("id"), "env")
	var body map[string]any
	if err := readJSON(r, &body); err != nil {
		return err
	}
	env := make([]string, 0, len(body))
	for _, name := range slices.Sorted(maps.Keys(body)) {
		value, ok := body[name].(string)
		if name == "" || !ok || strings.ContainsAny(name, "=\x00") || strings.Contains(value, "\x00") {
			return badRequest("%q: must be a name without = and NUL, its value a string without NUL", name)
		}
		env = append(env, name+"="+value)
	}
	return s.setEnv(r.Context(), r.PathValue("id"), env)
}
